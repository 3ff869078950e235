"""Contextual KD: relations between the words of a text, and between the layers of a word.

    L = L_task + CE(softmax(z/T), softmax(z_s/T)) + WR + LTR
    WR   mean over texts and layers of  D(words of the text) + A(words of the text)     (word relation)
    LTR  mean over texts and words of   D(layers of the word) + A(layers of the word)   (layer transforming relation)

D is the Huber loss between the squared distances of two vectors, each divided by the mean of its group. A is the Huber
loss between the cosines of the angles of three vectors, for words only within 2 places of the middle one (the window of
5 of the released code, which leaves open the choice of the loss and of squares). Relations need no W. In the released
code the factors of the four losses are 0.1 to 1000, by task. Here they are 1, and ``weights.hidden`` multiplies all. Of
several teachers the losses are averaged, or summed with ``paper = true``; soft labels are averaged as in ``kd``. Rows
without a label have no task loss.

LTR compares layers, each of which has a projection of its own: stored states are mapped back to the teacher's width
first. What a projection dropped is missing there. With two paired layers LTR is 0: one distance equals its mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.methods.base import Method, Needs, Owned, Pair, Scope, Setup, View, Weight
from kdcache.methods.parts.features import at_least_float32, count_vectors
from kdcache.methods.parts.hidden_states import active_targets, reduced
from kdcache.methods.parts.layer_map import EVEN
from kdcache.methods.parts.mixing import mean_probability
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss

if TYPE_CHECKING:
    from kdcache.loading.targets import Batch, Hidden

_TINY = 1e-12
_EQUAL = 1e-6  # a squared distance of this share of the mean is rounding
_WINDOW = 2  # words on each side


@dataclass(frozen=True)
class ContextualRelations:
    """The term: WR + LTR. A sum over texts, so a step may be cut into micro-batches."""

    name: str = "hidden"
    weight: Weight = "hidden"
    scope: Scope = "row"
    weighted: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(hidden="tokens")

    def bind(self, setup: Setup, /) -> BoundContextualRelations:
        """For every layer pair of the setup."""
        return BoundContextualRelations(self.name, setup)


class _Words(NamedTuple):
    """Both sides of a layer pair by text and word; ``valid`` is 0 for words without a target."""

    student: Tensor  # [B, L, width]
    teacher: Tensor  # [B, L, dim]
    valid: Tensor  # [B, L]


class BoundContextualRelations:
    """The bound term, without parameters. Logs WR of each layer pair, and LTR of each teacher."""

    owned: Mapping[str, Owned] = {}

    def __init__(self, name: str, setup: Setup) -> None:
        self._name, self._setup = name, setup

    def count(self, batch: Batch, /) -> Mapping[Pair, int]:
        """Texts with a target."""
        targets, mask = batch.targets.hidden if batch.targets is not None else {}, batch.inputs["attention_mask"]
        return {pair: count_vectors(target, mask, "mean") for pair, target in targets.items()}

    def __call__(self, view: View, log: dict[str, Tensor], /) -> Tensor:
        counts = view.counts.vectors[self._name]
        with torch.autocast(view.student_logits.device.type, enabled=False):  # differences need float32
            pairs = {
                pair: _words(target, view.student_hidden[pair[1]]) for pair, target in active_targets(view).items()
            }
            words = {
                pair: relations(side.student, side.teacher, side.valid, _WINDOW).sum() / max(counts[pair], 1)
                for pair, side in pairs.items()
            }
            layers = {
                (teacher, 0): self._layers(teacher, pairs) / max(counts[next(p for p in pairs if p[0] == teacher)], 1)
                for teacher in dict.fromkeys(teacher for teacher, _ in pairs)
            }
        of_words = reduced(words, self._name, self._setup, view, log)
        return of_words + reduced(layers, f"{self._name}/layers", self._setup, view, log)

    def _layers(self, teacher: int, pairs: Mapping[Pair, _Words]) -> Tensor:
        """LTR of a teacher, summed over texts."""
        own = {pair: words for pair, words in pairs.items() if pair[0] == teacher}
        student = torch.stack([words.student for words in own.values()], dim=2)  # [B, L, layers, width]
        states = torch.stack([self._unprojected(pair, words) for pair, words in own.items()], dim=2)
        valid = torch.stack([words.valid for words in own.values()], dim=2)
        by_word, present = relations(student, states, valid), valid.amin(dim=2)
        return ((by_word * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)).sum()

    def _unprojected(self, pair: Pair, words: _Words) -> Tensor:
        states: Tensor = self._setup.unproject(pair, words.teacher.flatten(0, 1)).unflatten(0, words.valid.shape)
        return states


def _words(target: Hidden, states: Tensor) -> _Words:
    batch, length, _ = states.shape
    states = at_least_float32(states)
    known = target.aligned().to(states.dtype)
    teacher = known.new_zeros(batch * length, known.shape[1]).index_copy(0, target.positions, known)
    valid = known.new_zeros(batch * length).index_fill(0, target.positions, 1.0)
    return _Words(states, teacher.unflatten(0, (batch, length)), valid.unflatten(0, (batch, length)))


def relations(student: Tensor, teacher: Tensor, valid: Tensor, window: int | None = None) -> Tensor:
    """D + A of each group of n vectors.

    Args:
        student: ``[..., n, width]``.
        teacher: ``[..., n, dim]``.
        valid: ``[..., n]``, 0 = leave out.
        window: Angles only of vectors that are at most so many places from the middle one; None: of all.

    Returns:
        ``[...]``: the mean over pairs plus the mean over triples of different vectors; 0 where there are none.
    """
    same = torch.eye(valid.shape[-1], dtype=torch.bool, device=valid.device)
    pairs = valid[..., :, None] * valid[..., None, :] * ~same
    grams = [_gram(side, valid) for side in (student, teacher)]
    distances = [_distances(gram) * pairs for gram in grams]
    means = [found.sum((-2, -1), keepdim=True) / pairs.sum((-2, -1), keepdim=True).clamp(min=1) for found in distances]
    mine, theirs = (found / mean.clamp(min=_TINY) for found, mean in zip(distances, means, strict=True))
    by_pair = _mean(F.smooth_l1_loss(mine, theirs, reduction="none"), pairs, 2)
    near = _near(valid.shape[-1], window, valid.device)
    triples = _triples(pairs, near)
    mine, theirs = (_angles(*side, near) for side in zip(grams, distances, means, strict=True))
    return by_pair + _mean(F.smooth_l1_loss(mine, theirs, reduction="none"), triples, 3)


def _gram(vectors: Tensor, valid: Tensor) -> Tensor:
    """Products of the vectors around their mean: distances and angles do not depend on the origin."""
    masked = vectors * valid[..., None]
    mean = masked.sum(dim=-2, keepdim=True) / valid.sum(dim=-1)[..., None, None].clamp(min=1)
    centred = (vectors - mean) * valid[..., None]
    return centred @ centred.transpose(-1, -2)


def _distances(gram: Tensor) -> Tensor:
    squares = gram.diagonal(dim1=-2, dim2=-1)
    return (squares[..., :, None] + squares[..., None, :] - 2 * gram).clamp(min=0)


def _near(count: int, window: int | None, device: torch.device) -> Tensor:
    """The places ``[n, k]`` around each place; n and more, or below 0, where there is none."""
    places = torch.arange(count, device=device)
    if window is None or window >= count - 1:
        return places.expand(count, count)
    return places[:, None] + torch.arange(-window, window + 1, device=device)


def _around(matrix: Tensor, near: Tensor) -> Tensor:
    """``[..., n, k]``: from every row of ``[..., n, n]`` the entries near it."""
    index = near.clamp(0, matrix.shape[-1] - 1).expand(*matrix.shape[:-1], -1)
    return matrix.gather(-1, index)


def _triples(pairs: Tensor, near: Tensor) -> Tensor:
    """1 for each middle j and different i, k near it that are all valid: ``[..., n, k, k]``."""
    inside = ((near >= 0) & (near < pairs.shape[-1])).to(pairs.dtype)
    beside = _around(pairs, near) * inside
    different = near[:, :, None] != near[:, None, :]
    return beside[..., :, None] * beside[..., None, :] * different


def _angles(gram: Tensor, distances: Tensor, mean: Tensor, near: Tensor) -> Tensor:
    """Cosine of the angle at j between i and k: ``[..., n, k, k]``; 0 where two of them are equal but for rounding."""
    count = gram.shape[-1]
    place = near.clamp(0, count - 1)
    among = gram[..., place[:, :, None], place[:, None, :]]  # i with k
    beside, own = _around(gram, near), gram.diagonal(dim1=-2, dim2=-1)
    products = among - beside[..., :, None] - beside[..., None, :] + own[..., None, None]
    squares = _around(distances, near)
    apart = squares > _EQUAL * mean + _TINY
    lengths = torch.where(apart, squares, 1.0).sqrt()
    return products / (lengths[..., :, None] * lengths[..., None, :]) * (apart[..., :, None] & apart[..., None, :])


def _mean(errors: Tensor, present: Tensor, dims: int) -> Tensor:
    over = tuple(range(-dims, 0))
    return (errors * present).sum(dim=over) / present.sum(dim=over).clamp(min=1)


METHOD = Method(
    "ckd",
    "CKD (relations of words and layers)",
    "Park, Kim, Yang, EMNLP 2021, arXiv 2109.08359, section 3",
    terms=(TaskLoss(), SoftLabels(mixing=mean_probability), ContextualRelations()),
    layer_map=EVEN,
    note="soft labels, and distances and angles between the words of a text and between the layers of a word",
)
