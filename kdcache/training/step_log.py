"""Where a training is, and the losses of its steps: read from the device every few steps, checked and logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdcache.errors import NonFiniteError

if TYPE_CHECKING:
    from kdcache.progress import Progress

NOT_FINITE_HINT = "Lower learning_rate, raise warmup, or use precision bf16 or float32 instead of fp16."


@dataclass
class Place:
    """The position of the training, as in a checkpoint."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0  # optimizer steps done
    best_epoch: int = -1
    best_score: float = -math.inf
    best_step: int = -1  # optimizer steps done at the best evaluation
    without_better: int = 0  # evaluations since then
    stopped: bool = False  # by ``patience``
    logged_steps: int = 0  # number of steps in ``sums``
    sums: dict[str, float] = field(default_factory=dict)


class _Unread(NamedTuple):
    """The losses of an optimizer step while they are on the device: a copy to the host waits for all steps before."""

    step: int  # optimizer steps done
    ends_epoch: bool
    learning_rate: float
    names: tuple[str, ...]  # of all values, in order
    numbers: Mapping[str, float]  # values that are on the host already
    values: Tensor  # the others
    scaled: bool  # by fp16's scaler, which skips steps with infinite gradients


class StepLog:
    """Losses of steps. Each step adds its own; ``read`` copies them to the host, where NaN and infinity are errors.

    ``read_steps``: steps after which ``add`` reads. ``log_steps``: steps whose means are one line of the metrics.
    """

    def __init__(
        self,
        place: Place,
        progress: Progress,
        on_metrics: Callable[[dict[str, Any]], None],
        steps_per_epoch: int,
        log_steps: int,
        read_steps: int,
    ) -> None:
        self._place, self._progress, self._on_metrics = place, progress, on_metrics
        self._steps_per_epoch, self._log_steps, self._read_steps = steps_per_epoch, log_steps, read_steps
        self._unread: list[_Unread] = []

    def add(self, values: Mapping[str, float | Tensor], learning_rate: float, *, scaled: bool) -> None:
        """The ``loss``, ``grad_norm`` and terms of the step that ``place`` counts as done.

        ``scaled``: fp16's scaler skips steps with infinite gradients, which are normal at first.

        Raises NonFiniteError where it reads.
        """
        ends_epoch = self._place.step_in_epoch == self._steps_per_epoch
        numbers = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        tensors = torch.stack(_of_one_dtype([value for value in values.values() if isinstance(value, Tensor)]))
        step = _Unread(self._place.step, ends_epoch, learning_rate, tuple(values), numbers, tensors, scaled)
        self._unread.append(step)
        if len(self._unread) >= self._read_steps:
            self.read()

    def read(self) -> None:
        """Read what was not read yet. Raises NonFiniteError, naming step and term."""
        unread, self._unread = self._unread, []
        read = iter(torch.cat([step.values for step in unread]).cpu().tolist() if unread else ())  # one copy
        for step in unread:
            values = {name: step.numbers[name] if name in step.numbers else next(read) for name in step.names}
            self._check_finite(step, values)
            self._log(step, values)
            self._progress.advance(1, loss=values["loss"])

    def _check_finite(self, step: _Unread, values: Mapping[str, float]) -> None:
        whole = {"loss": "loss", "grad_norm": "gradient norm"}
        bad = [f"{name} = {value}" for name, value in values.items() if name not in whole and not math.isfinite(value)]
        for name, shown in whole.items():
            if not bad and not math.isfinite(values[name]) and not (step.scaled and name == "grad_norm"):
                bad = [f"{shown} = {values[name]}"]
        if bad:
            raise NonFiniteError(
                f"training is not finite at step {step.step} (epoch {self._place.epoch + 1}): {', '.join(bad)}",
                NOT_FINITE_HINT,
            )

    def _log(self, step: _Unread, values: Mapping[str, float]) -> None:
        place = self._place
        place.logged_steps += 1
        for name, value in values.items():
            place.sums[name] = place.sums.get(name, 0.0) + value
        if place.logged_steps == self._log_steps or step.ends_epoch:
            means = {name: value / place.logged_steps for name, value in place.sums.items()}
            said = {"steps": place.logged_steps, "learning_rate": step.learning_rate, **means}
            self._on_metrics({"event": "steps", "step": step.step, "epoch": place.epoch + 1, **said})
            place.logged_steps, place.sums = 0, {}


def _of_one_dtype(values: Sequence[Tensor]) -> list[Tensor]:
    """Scalars in float64 where any is, else in float32."""
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    return [value.to(dtype) for value in values]
