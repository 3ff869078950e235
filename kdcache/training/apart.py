"""A model whose modules are held by different processes; all of them hold a few ``shared`` parameters.

The processes sum the gradients of the shared parameters, and no others. The norm by which gradients are clipped is that
of the whole model: each process adds the squares of its own gradients to the sums of the step. So the weights are those
of one process that holds everything, up to rounding.

The names of parameters begin with the number of their module in the whole model, as those of a list of modules do. A
shared parameter has the name under its first module; a process may hold it under another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdcache.training.optim import parameter_groups
from kdcache.training.step_sums import StepSums

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kdcache.training.processes import Processes
    from kdcache.training.settings import LoopSettings

_SQUARES = "squares of the gradients of each process"


class Apart:
    """How the modules of this process fit into the whole model; one object per training.

    ``shared``: parameters that all processes hold, in the same order. ``names``: of a trained parameter here -> in the
    whole model. ``order``: the names of all trained parameters, in the order of the optimizer of one process.
    """

    def __init__(
        self,
        processes: Processes,
        model: nn.Module,
        shared: Sequence[Tensor],
        settings: LoopSettings,
        device: torch.device,
    ) -> None:
        self.shared = [parameter for parameter in shared if parameter.requires_grad]
        self._sums = StepSums(processes, self.shared, device)
        places = {id(parameter): place for place, parameter in enumerate(self.shared)}
        trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        self._own = [one for _, one in trained if id(one) not in places]
        mine = [(name, tuple(one.shape), places.get(id(one))) for name, one in trained]
        every = sorted(itertools.chain(*processes.gathered(mine)), key=lambda entry: int(entry[0].partition(".")[0]))
        first: dict[int, str] = {}
        for name, _, place in every:
            if place is not None:
                first.setdefault(place, name)
        self.names = {name: name if place is None else first[place] for name, _, place in mine}
        whole = {name: shape for name, shape, place in every if place is None or first[place] == name}
        self.order = _optimizer_order(whole, settings)
        self._squares = torch.zeros((), device=device)

    def add(self, values: Mapping[str, float | Tensor], *, due: bool) -> tuple[dict[str, float | Tensor], bool]:
        """As ``StepSums.add``: of shared parameters, the gradients become their sums."""
        sums, is_due = self._sums.add({**values, _SQUARES: self._squares_of(self._own)}, due=due)
        squares = sums.pop(_SQUARES)
        assert isinstance(squares, Tensor)
        self._squares = squares
        return sums, is_due

    def clip(self, accelerator: Accelerator, max_norm: float) -> Tensor:
        """Scale gradients to ``max_norm`` if their norm over the whole model is longer; that norm. ``add`` comes first.

        An infinite gradient anywhere makes the gradients of shared parameters NaN everywhere, so that fp16's scaler
        skips the step in all processes.
        """
        if accelerator.scaler is not None:
            for gradient in _gradients(self.shared):
                gradient.add_(self._squares * 0.0)
            self._squares = self._squares / accelerator.scaler.get_scale() ** 2
        accelerator.unscale_gradients()
        norm = (self._squares + self._squares_of(self.shared)).sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        gradients = _gradients([*self._own, *self.shared])
        torch._foreach_mul_(gradients, factor)
        return norm

    def _squares_of(self, parameters: Sequence[Tensor]) -> Tensor:
        """The sum of the squares of all gradients."""
        gradients = _gradients(parameters)
        if not gradients:
            return torch.zeros_like(self._squares)
        return torch.stack(torch._foreach_norm(gradients)).square().sum()


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _optimizer_order(shapes: Mapping[str, tuple[int, ...]], settings: LoopSettings) -> list[str]:
    parameters = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in shapes.items()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = parameter_groups(
        parameters.items(), settings.weight_decay, settings.lr_by_prefix, decay_by_prefix=settings.decay_by_prefix
    )
    return [names[id(parameter)] for group in groups for parameter in group["params"]]
