"""The slot w: the weight of a teacher on a row, a pure function of student logits, teacher logits and labels.

All three are available with live and with cached teachers, so a new weighting never needs a new dump. Every weighting
handles rows without a label.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Weighting(Protocol):
    """Weights [teachers, batch] of the teachers' terms; ``teacher_weights`` makes constants of them."""

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, /) -> Tensor:
        """Weights ``[teachers, batch]``.

        Shapes: student_logits ``[batch, classes]``, teacher_logits ``[teachers, batch, classes]``, labels ``[batch]``,
        -1 = none.
        """
        ...


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


def teacher_cross_entropy(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """CE(y, softmax(z_i)) as [teachers, batch]; 0 on rows without a label."""
    labelled = labels >= 0
    index = labels.clamp(min=0).expand(teacher_logits.shape[:2]).unsqueeze(-1)
    losses = -F.log_softmax(teacher_logits, dim=-1).gather(-1, index).squeeze(-1)
    return torch.where(labelled, losses, torch.zeros_like(losses))
