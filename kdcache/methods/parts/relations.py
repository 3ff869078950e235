"""Relations among the rows of a batch, for the slot R: distances, angles and cosines (RKD, arXiv 1904.05068).

Each compares relations among the student's vectors with those among the teacher's, so widths may differ. Rows are the
dimension before the last; more dimensions may precede it. Rows with ``valid`` = 0 are masked, without a copy to the
host. The result is the mean over the remaining relations, 0 if there are none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12


def distance_relation(student: Tensor, teacher: Tensor, valid: Tensor, /) -> Tensor:
    """Huber loss between the distances of two rows, each divided by the mean distance (RKD, section 3.2.1).

    Args:
        student: ``[..., rows, width]``.
        teacher: ``[..., rows, dim]``.
        valid: ``[..., rows]``, 0 or 1.

    Returns:
        A scalar: the mean over pairs of different rows.
    """
    pairs = _pairs(valid)
    of_student, of_teacher = (_scaled_distances(side, pairs) for side in (student, teacher))
    return _mean(F.smooth_l1_loss(of_student, of_teacher, reduction="none"), pairs)


def angle_relation(student: Tensor, teacher: Tensor, valid: Tensor, /) -> Tensor:
    """Huber loss between the cosines of the angles that two rows form at a third (RKD, section 3.2.2).

    Arguments as in ``distance_relation``. The mean is over triples of different rows.
    """
    pairs = _pairs(valid)  # [..., vertex, other row]
    triples = pairs[..., :, :, None] * pairs[..., :, None, :] * pairs[..., None, :, :]
    of_student, of_teacher = (_angles(side, pairs) for side in (student, teacher))
    return _mean(F.smooth_l1_loss(of_student, of_teacher, reduction="none"), triples)


def cosine_relation(student: Tensor, teacher: Tensor, valid: Tensor, /) -> Tensor:
    """Mean squared error between the cosines of two rows. Arguments as in ``distance_relation``."""
    of_student, of_teacher = (_cosines(F.normalize(side, dim=-1)) for side in (student, teacher))
    return _mean((of_student - of_teacher).square(), _pairs(valid))


def _pairs(valid: Tensor) -> Tensor:
    """1 where two different rows are both valid, ``[..., rows, rows]``."""
    same = torch.eye(valid.shape[-1], dtype=valid.dtype, device=valid.device)
    return valid[..., :, None] * valid[..., None, :] * (1 - same)


def _mean(errors: Tensor, present: Tensor) -> Tensor:
    return (errors * present).sum() / present.sum().clamp(min=1)


def _differences(rows: Tensor) -> Tensor:
    """``[..., i, j]`` is row j minus row i."""
    return rows[..., None, :, :] - rows[..., :, None, :]


def _scaled_distances(rows: Tensor, pairs: Tensor) -> Tensor:
    distances = torch.linalg.vector_norm(_differences(rows), dim=-1) * pairs
    mean = distances.sum(dim=(-2, -1), keepdim=True) / pairs.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
    scaled: Tensor = distances / mean.clamp(min=_TINY)
    return scaled


def _angles(rows: Tensor, pairs: Tensor) -> Tensor:
    differences = _differences(rows)
    lengths = torch.linalg.vector_norm(differences, dim=-1, keepdim=True)
    lengths = torch.where(lengths > _TINY, lengths, 1.0)  # equal rows have no direction; avoids infinite gradients
    return _cosines(differences / lengths * pairs[..., None])


def _cosines(directions: Tensor) -> Tensor:
    cosines: Tensor = directions @ directions.transpose(-1, -2)
    return cosines
