"""The slot w: the weight of a teacher on a row, a pure function of student logits, teacher logits and labels.

All three are available with live and with cached teachers, so a new weighting never needs a new dump. Every weighting
handles rows without a label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.methods.parts.schedule import rank_shares

if TYPE_CHECKING:
    from kdcache.methods.base import Setup

_TINY = 1e-12


class Weighting(Protocol):
    """Weights [teachers, batch] of the teachers' terms; ``teacher_weights`` makes constants of them."""

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, /) -> Tensor:
        """Weights ``[teachers, batch]``.

        Shapes: student_logits ``[batch, classes]``, teacher_logits ``[teachers, batch, classes]``, labels ``[batch]``,
        -1 = none.
        """
        ...


@runtime_checkable
class WeightingRule(Protocol):
    """A weighting that depends on facts about the teachers; bound once, before the first step.

    Attributes:
        reads: The facts, for ``kdcache methods``.
    """

    @property
    def reads(self) -> str: ...

    def bind(self, setup: Setup, /) -> Weighting:
        """The weighting for the teachers of ``setup``. Raises RecipeError where a fact is missing."""
        ...


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers [n] in dtype and on device of ``like``; filled there, since a copy would wait for an accelerator."""
    return torch.stack([like.new_full((), value) for value in values])


def teacher_weights(weighting: Weighting, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """w_i(x) as constants: no gradient flows through them, even if a weighting uses the student's logits.

    Args:
        weighting: The function to apply.
        student_logits: ``[batch, classes]``.
        teacher_logits: ``[teachers, batch, classes]``.
        labels: ``[batch]``, -1 = none.

    Returns:
        Weights ``[teachers, batch]``.
    """
    with torch.no_grad():
        return weighting(student_logits, teacher_logits, labels)


def one(_student_logits: Tensor, teacher_logits: Tensor, _labels: Tensor, /) -> Tensor:
    """Weight 1 for every teacher on every row."""
    return torch.ones(teacher_logits.shape[:2], dtype=teacher_logits.dtype, device=teacher_logits.device)


def inverse_cross_entropy(_student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, /) -> Tensor:
    """1 / (1 + CE(y, softmax(z_i))): less weight where the teacher is wrong (MT-BERT, section 3.2, eq. 2).

    Rows without a label have weight 1, since the teacher's error is unknown.
    """
    return 1.0 / (1.0 + teacher_cross_entropy(teacher_logits, labels))


def softmax_of_errors(_student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, /) -> Tensor:
    """Softmax over the teachers of -CE(y, softmax(z_i)) (Tiny-NewsRec, arXiv 2112.00944).

    The weights of a row sum to 1. Rows without a label have 1/N, since the errors are unknown.
    """
    return F.softmax(-teacher_cross_entropy(teacher_logits, labels), dim=0)


def confidence(_student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, /) -> Tensor:
    """(1 - exp(CE_i) / sum_j exp(CE_j)) / (N - 1) (CA-MKD, arXiv 2201.00007).

    The weights of a row sum to 1, and none exceeds 1/(N - 1). Rows without a label have 1/N; a single teacher has 1.
    """
    return _complements(F.softmax(teacher_cross_entropy(teacher_logits, labels), dim=0))


def low_entropy(_student_logits: Tensor, teacher_logits: Tensor, _labels: Tensor, /) -> Tensor:
    """(1 - H_i / sum_j H_j) / (N - 1), H_i the entropy of teacher i on the row; it needs no label.

    The weights of a row sum to 1. Teachers that are all certain have 1/N; a single teacher has 1.
    """
    entropies = entropy(teacher_logits)
    total = entropies.sum(dim=0, keepdim=True)
    equal = torch.full_like(entropies, 1 / len(entropies))
    return _complements(torch.where(total > 0, entropies / total.clamp(min=_TINY), equal))


@dataclass(frozen=True)
class ByStudentUncertainty:
    """w_i = (1 - u) r_i + u (1 - r_i), divided by N/2: uncertain students learn from weaker teachers.

    u in [0, 1] is the entropy of the student on the row, divided by its maximum log C. r_i is the rank of the teacher's
    validation score, scaled to [0, 1]. For two teachers the weights are 1 - u for the better one and u for the weaker
    one (dynamic KD, arXiv 2109.11295). It needs no label. A single teacher has weight 1.
    """

    reads: str = "validation scores"

    def bind(self, setup: Setup, /) -> Weighting:
        """With the ranks of these teachers."""
        scores = setup.validation_scores()
        count = len(scores)
        ranks = [(share * count * (count + 1) / 2 - 1) / max(count - 1, 1) for share in rank_shares(scores)]

        def weigh(student_logits: Tensor, teacher_logits: Tensor, _labels: Tensor, /) -> Tensor:
            if count == 1:
                return torch.ones_like(teacher_logits[..., 0])
            logits = finest(student_logits)  # 1 - u of a new student is near 0
            uncertainty = entropy(logits) / math.log(logits.shape[-1])
            rank = constants(ranks, logits)[:, None]
            return (((1 - uncertainty) * rank + uncertainty * (1 - rank)) * 2 / count).to(teacher_logits.dtype)

        return weigh


def finest(logits: Tensor) -> Tensor:
    """In float64, for small differences of probabilities; in float32 on a device that has no float64 (Apple's)."""
    return logits.float() if logits.device.type == "mps" else logits.double()


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats: ``[..., classes]`` -> ``[...]``."""
    log_probabilities = F.log_softmax(logits, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def _complements(shares: Tensor) -> Tensor:
    """(1 - s_i) / (N - 1) of shares that sum to 1 over the teachers; 1 for a single teacher."""
    return torch.ones_like(shares) if len(shares) == 1 else (1 - shares) / (len(shares) - 1)


def teacher_cross_entropy(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """CE(y, softmax(z_i)) as [teachers, batch]; 0 on rows without a label."""
    labelled = labels >= 0
    index = labels.clamp(min=0).expand(teacher_logits.shape[:2]).unsqueeze(-1)
    losses = -F.log_softmax(teacher_logits, dim=-1).gather(-1, index).squeeze(-1)
    return torch.where(labelled, losses, torch.zeros_like(losses))
