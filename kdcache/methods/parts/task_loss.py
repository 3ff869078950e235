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

    def bind(self, _setup: Setup, /) -> BoundTaskLoss:
        """Independent of the setup."""
        return BoundTaskLoss()


class BoundTaskLoss:
    """The bound term, without parameters."""

    owned: Mapping[str, Owned] = {}

    def count(self, _batch: Batch, /) -> Mapping[Pair, int]:
        return {}

    def __call__(self, view: View, _log: dict[str, Tensor], /) -> Tensor:
        return task_loss(view.student_logits, view.labels, view.counts.labelled)
