"""AdamW with the usual parameter groups, schedules of the learning rate, and averaged weights.

Biases and norm weights (all parameters with at most one dimension) get no weight decay. The fused kernel is used where
torch has one: on two CPU cores, the plain loop over 200M parameters takes longer than the forward pass of a small
teacher.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

ScheduleName = Literal["linear", "cosine", "constant"]


def adamw(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    learning_rate: float,
    weight_decay: float,
    lr_by_prefix: Mapping[str, float] | None = None,
    *,
    decay_by_prefix: bool = False,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """AdamW (betas 0.9 and 0.999) over the parameters that require a gradient; move the model to its device first.

    ``lr_by_prefix``: learning rates of parameters by prefix of their names; these get no weight decay, unless
    ``decay_by_prefix`` treats them as all others. ``fused``: the kernel that updates all parameters at once; None uses
    it where there is one.
    """
    groups = parameter_groups(named_parameters, weight_decay, lr_by_prefix or {}, decay_by_prefix=decay_by_prefix)
    there = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, fused=there and fused is not False)


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    weight_decay: float,
    rates: Mapping[str, float],
    *,
    decay_by_prefix: bool = False,
) -> list[dict[str, Any]]:
    """The groups of ``adamw``, without empty ones."""
    shared: list[torch.nn.Parameter] = []
    apart: dict[str, list[torch.nn.Parameter]] = {prefix: [] for prefix in rates}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            prefix = next((prefix for prefix in rates if name.startswith(prefix)), None)
            (shared if prefix is None else apart[prefix]).append(parameter)
    groups = _by_dimensions(shared, weight_decay)
    for prefix, rate in rates.items():
        own = _by_dimensions(apart[prefix], weight_decay) if decay_by_prefix else [_group(apart[prefix], 0.0)]
        groups += [group | {"lr": rate} for group in own]
    return [group for group in groups if group["params"]]


def _by_dimensions(parameters: Sequence[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, biases and norm weights without."""
    return [
        _group([parameter for parameter in parameters if parameter.ndim > 1], weight_decay),
        _group([parameter for parameter in parameters if parameter.ndim <= 1], 0.0),
    ]


def _group(parameters: list[torch.nn.Parameter], weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "weight_decay": weight_decay}


def schedule_factor(step: int, total_steps: int, warmup: float, schedule: ScheduleName = "linear") -> float:
    """Factor of the learning rate at step ``step`` (from 0): linear from 0 to 1 over the warm-up, then as ``schedule``.

    ``linear`` and ``cosine`` fall to 0 at ``total_steps``. The first step's factor is greater than 0, so that no step
    is wasted.
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    left = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


class WarmupSchedule:
    """Linear warm-up over ``warmup`` (a share of all steps), then ``schedule`` until ``total_steps``.

    Call ``step()`` after each optimizer step. ``LambdaLR`` would warn if fp16's gradient scaler skips the first steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        warmup: float,
        schedule: ScheduleName = "linear",
    ) -> None:
        self._optimizer = optimizer
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self._total_steps = total_steps
        self._warmup = warmup
        self._schedule = schedule
        self._at(0)

    def _at(self, step: int) -> None:
        self._step = step
        factor = schedule_factor(step, self._total_steps, self._warmup, self._schedule)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def step(self) -> None:
        self._at(self._step + 1)

    @property
    def learning_rate(self) -> float:
        """Of the first group, for the metrics."""
        return float(self._optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "peaks": self._peaks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._peaks = list(state["peaks"])
        self._at(int(state["step"]))


class AveragedWeights:
    """The exponential moving average of a model's trained parameters: average = d * average + (1 - d) * parameter.

    In step t (from 1) the decay d is min(``decay``, (1 + t) / (10 + t)): with the full decay from the start, the
    average of a short training would be mostly the initial weights.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], decay: float) -> None:
        self._decay = decay
        trained = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        self._parameters: list[torch.Tensor] = list(trained.values())
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self._names = list(trained)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the present weights; ``step`` is the number of optimizer steps done."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._parameters, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights while the block runs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, average in zip(self._parameters, self._average, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(zip(self._names, self._average, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, average in zip(self._names, self._average, strict=True):
            average.copy_(state[name])
