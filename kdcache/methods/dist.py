"""DIST: correlations of the probabilities, within a row and within a class, in place of equal probabilities.

    L = L_task + inter + intra    (the factors beta and gamma are 1, the default of the released code)
    inter = mean over rows of 1 - pearson(student's row, teacher's row)
    intra = mean over classes of 1 - pearson(student's column, teacher's column of the batch)

Probabilities are softened by T; set ``t_squared = true`` for the factor T² of the released code. Columns are compared
over all rows of a step, with or without labels. With two classes the correlation within a row is 1 or -1, so only intra
has a gradient. Of several teachers it takes the mean probability, as ``kd`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.methods.base import Method, Needs, Owned, Pair, Scope, Setup, View, Weight
from kdcache.methods.parts.mixing import mean_probability
from kdcache.methods.parts.task_loss import TaskLoss
from kdcache.methods.parts.weighting import finest

if TYPE_CHECKING:
    from kdcache.loading.targets import Batch


@dataclass(frozen=True)
class Correlations:
    """The term: inter + intra."""

    name: str = "soft"
    weight: Weight = "soft"
    scope: Scope = "batch"
    weighted: bool = True

    @property
    def needs(self) -> Needs:
        return Needs(logits=True)

    def bind(self, setup: Setup, /) -> BoundCorrelations:
        """With temperature and T² of the setup."""
        return BoundCorrelations(self.name, setup)


class BoundCorrelations:
    """The bound term, without parameters. Logs both parts."""

    owned: Mapping[str, Owned] = {}

    def __init__(self, name: str, setup: Setup) -> None:
        self._name, self._temperature = name, setup.temperature
        self._factor = setup.temperature**2 if setup.t_squared else 1.0

    def count(self, _batch: Batch, /) -> Mapping[Pair, int]:
        return {}

    def __call__(self, view: View, log: dict[str, Tensor], /) -> Tensor:
        targets, _ = mean_probability(finest(view.teacher_logits), finest(view.weights), self._temperature)
        with torch.autocast(targets.device.type, enabled=False):
            student = F.softmax(finest(view.student_logits) / self._temperature, dim=-1)
            teacher = F.softmax(targets[0] / self._temperature, dim=-1)
            inter = self._factor * _distance(student, teacher)
            intra = self._factor * _distance(student.T, teacher.T)
        log |= {f"{self._name}/inter": inter, f"{self._name}/intra": intra}
        return inter + intra


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over rows of 1 - the Pearson correlation of ``[rows, values]``; 1 for a constant row."""
    mine, theirs = (side - side.mean(dim=1, keepdim=True) for side in (student, teacher))
    return (1 - F.cosine_similarity(mine, theirs, dim=1)).mean()


METHOD = Method(
    "dist",
    "DIST",
    "Huang, You, Wang, Qian, Xu, NeurIPS 2022, arXiv 2205.10536, section 3",
    terms=(TaskLoss(), Correlations()),
    note="correlations of probabilities within each row and within each class of a batch",
)
