"""The task loss: cross-entropy with the gold labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from kdcache.methods.base import Needs, Owned, Pair, Scope, Setup, View, Weight

if TYPE_CHECKING:
    from kdcache.loading.targets import Batch


def task_loss(student_logits: Tensor, labels: Tensor, count: int | None = None) -> Tensor:
    """CE(y, z_s) averaged over the rows that have a label.

    Args:
        student_logits: ``[batch, classes]``.
        labels: ``[batch]``, -1 = none.
        count: Labelled rows of the whole step; by default those of ``labels``.

    Returns:
        A scalar; 0, with a gradient of 0, where no row has a label.
    """
    labelled = int((labels >= 0).sum()) if count is None else count
    summed = F.cross_entropy(student_logits, labels, ignore_index=-1, reduction="sum")
    return summed / max(labelled, 1)


@dataclass(frozen=True)
class TaskLoss:
    """The term; it needs no teacher."""

    name: str = "task"
    weight: Weight = "task"
    scope: Scope = "row"
    weighted: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(labels=True)

    def bind(self, setup: Setup, /) -> BoundTaskLoss:
        """For the rows that the mean is over."""
        return BoundTaskLoss(setup.task_over_rows)


class BoundTaskLoss:
    """The bound term, without parameters.

    ``over_rows``: the sum over labelled rows is divided by all rows of the step. A row with a label then weighs as much
    as in a step whose rows all have one. Without it, few labelled rows weigh as much as all others together.
    """

    owned: Mapping[str, Owned] = {}

    def __init__(self, over_rows: bool = False) -> None:
        self._over_rows = over_rows

    def count(self, _batch: Batch, /) -> Mapping[Pair, int]:
        return {}

    def __call__(self, view: View, _log: dict[str, Tensor], /) -> Tensor:
        counts = view.counts
        return task_loss(view.student_logits, view.labels, counts.rows if self._over_rows else counts.labelled)
