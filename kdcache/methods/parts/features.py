"""The slot Φ: which vectors of hidden states are compared, on both sides of a layer pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from kdcache.codecs.base import TokenSelection
    from kdcache.loading.targets import Hidden
    from kdcache.methods.base import Feature

FITS: Mapping[Feature, tuple[TokenSelection, ...]] = {  # what a cache may hold (dump.tokens) for a feature
    "stored": ("all", "first", "pooled"),
    "tokens": ("all",),
    "first": ("all", "first"),
    "mean": ("all", "pooled"),
}


class Vectors(NamedTuple):
    """The two sides of a layer pair: n vectors each, and the row of the batch that each belongs to.

    ``valid`` [n] is 0 for vectors without a target; they stay, so that shapes do not depend on values. None: all have
    a target.
    """

    student: Tensor  # [n, width]
    teacher: Tensor  # [n, dim]
    rows: Tensor | None  # [n]; None: vector n is row n
    valid: Tensor | None


def select_vectors(target: Hidden, states: Tensor, mask: Tensor, feature: Feature) -> Vectors:
    """Φ without scaling.

    Args:
        target: Of one layer pair.
        states: The student's, ``[batch, tokens, width]``.
        mask: Attention mask, ``[batch, tokens]``; padding may be on either side.
        feature: Which vectors. The first token is the first that is not padding. The mean is over the tokens with a
            target; for targets that are stored as a mean, over all tokens.

    Returns:
        For ``stored`` and ``tokens``, and for means that are stored, one vector per target; else one per row. No value
        is copied to the host, which would wait for the device.
    """
    flat = states.flatten(0, 1)
    if feature in ("stored", "tokens"):
        return Vectors(target.of_student(flat), target.aligned(), target.rows(states.shape[1]), None)
    if target.bags is not None:
        return Vectors(target.of_student(flat), target.aligned(), target.bag_rows, None)
    begins = torch.arange(len(states), device=target.positions.device) * states.shape[1]
    return _first(target, flat, begins + mask.argmax(dim=1)) if feature == "first" else _mean(target, flat, begins)


def _first(target: Hidden, flat: Tensor, first: Tensor) -> Vectors:
    student, covered = flat.index_select(0, first), len(target.positions)
    if not covered:
        return _nothing(student, target)
    place = torch.searchsorted(target.positions, first).clamp(max=covered - 1)
    valid = target.positions[place] == first
    if target.src is None:  # decode only what is used
        scales = None if target.scales is None else target.scales[place]
        teacher = replace(target, values=target.values[place], scales=scales, positions=first).aligned()
    else:
        teacher = target.aligned()[place]
    return Vectors(student, teacher, None, valid)


def _mean(target: Hidden, flat: Tensor, begins: Tensor) -> Vectors:
    covered = len(target.positions)
    if not covered:
        return _nothing(flat.index_select(0, begins), target)
    offsets = torch.searchsorted(target.positions, begins)
    counts = torch.diff(offsets, append=offsets.new_full((1,), covered))
    teacher = F.embedding_bag(torch.arange(covered, device=offsets.device), target.aligned(), offsets, mode="mean")
    return Vectors(
        F.embedding_bag(target.positions, at_least_float32(flat), offsets, mode="mean"), teacher, None, counts > 0
    )


def _nothing(student: Tensor, target: Hidden) -> Vectors:
    teacher = target.aligned()
    return Vectors(student, teacher.new_zeros(len(student), teacher.shape[1]), None, torch.zeros_like(student[:, 0]))


def count_vectors(target: Hidden, mask: Tensor, feature: Feature) -> int:
    """How many vectors of a feature have a target; computed on the host. ``mask``: ``[batch, tokens]``."""
    if feature in ("stored", "tokens") or target.bags is not None:
        return target.count
    positions, length = target.positions.cpu(), mask.shape[1]
    if feature == "mean":
        return len(torch.unique_consecutive(positions // length))
    first = mask.cpu().argmax(dim=1) + length * torch.arange(len(mask))
    return int(torch.isin(first, positions).sum())


def at_least_float32(tensor: Tensor) -> Tensor:
    """float64 stays; other dtypes become float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
