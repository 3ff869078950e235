"""The seam between where teacher targets come from and who learns from them.

A trainer sees batches of a ``TargetSource`` and cannot tell whether the teachers ran months ago (``CachedBatches``) or run
now (``LiveBatches``). That is also how the two are tested to be equal. Targets are packed, never padded, and stay quantised
until they are on the device: what travels is what was stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from kdcache.distill.forms import Decoder


@dataclass(frozen=True, eq=False)
class Hidden:
    """Hidden states of one teacher layer for the student tokens of one batch.

    ``values`` are the teacher's tokens, [S, dim] in float32, float16 or int8; with ``scales`` [S] a value is code x scale; with
    ``decoder`` they are uint8 [S, bytes], and it gives the values.
    Student token p (of P covered ones) is sum over the entries n with dst[n] = p of weight[n] * values[src[n]]. ``dst`` is
    ascending and names every p at least once. ``src is None`` means the identity: S = P, token p is values[p].
    ``positions`` [P], ascending, are flat places b * L + t in the student's [B, L]; tokens that no teacher token overlaps
    are not among them. Layers of a teacher that are stored for the same tokens share the same ``src``, ``dst``, ``weight`` and
    ``positions`` objects.

    Targets per text need no alignment: S = P = B. For that of the first token ``positions`` are the students' first tokens. For
    the mean of the tokens ``positions`` are all tokens of the batch and ``bags`` [B] says where those of each row begin.
    """

    values: Tensor
    scales: Tensor | None
    src: Tensor | None
    dst: Tensor | None
    weight: Tensor | None
    positions: Tensor
    decoder: Decoder | None = None
    bags: Tensor | None = None

    @property
    def count(self) -> int:
        """P, the student vectors that have a target."""
        return len(self.positions) if self.bags is None else len(self.bags)

    def rows(self, length: int) -> Tensor:
        """The row of the batch, padded to ``length``, that each of the P targets belongs to."""
        return self.positions // length if self.bags is None else torch.arange(self.count, device=self.bags.device)

    def of_student(self, states: Tensor) -> Tensor:
        """[P, width]: what of the student's ``states`` [B * L, width] the targets are for."""
        if self.bags is None:
            return states.index_select(0, self.positions)
        return torch.nn.functional.embedding_bag(self.positions, states.float(), self.bags, mode="mean")

    def aligned(self) -> Tensor:
        """The targets of the covered student tokens, [P, dim] float32, on the device of the values. No gradient flows.

        Sums go through ``embedding_bag``: several times faster than ``index_add`` and, unlike it, deterministic on a GPU.
        """
        values = self.values.to(torch.float32) if self.decoder is None else self.decoder(self.values)
        if self.src is None or self.dst is None or self.weight is None:
            return values if self.scales is None else values * self.scales[:, None]
        if not len(self.positions):
            return values.new_empty(0, values.shape[1])
        weight = self.weight if self.scales is None else self.weight * self.scales[self.src]
        first = torch.searchsorted(self.dst, torch.arange(len(self.positions), device=self.dst.device))
        return torch.nn.functional.embedding_bag(self.src, values, first, mode="sum", per_sample_weights=weight)


@dataclass(frozen=True, eq=False)
class Targets:
    """What N teachers say about one batch.

    ``logits`` is [N, B, C] float32 in the order of ``teachers``, with C = 0 where the source was asked for none; ``hidden``
    is keyed by (teacher index, student layer 1..K) and empty where the source was asked for none.
    """

    teachers: tuple[str, ...]
    logits: Tensor
    hidden: dict[tuple[int, int], Hidden]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one step: the student's ``inputs`` [B, L], ``labels`` [B] (-1 = none), ids uint8[B, 16], and the targets."""

    inputs: dict[str, Tensor]
    labels: Tensor
    text_ids: np.ndarray
    targets: Targets | None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``; a tensor that several layers share travels once."""
        moved: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device, non_blocking=non_blocking)
            return moved[id(tensor)]

        def move_if(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else move(tensor)

        def move_hidden(h: Hidden) -> Hidden:
            return Hidden(
                move(h.values), move_if(h.scales), move_if(h.src), move_if(h.dst), move_if(h.weight), move(h.positions),
                h.decoder, move_if(h.bags),
            )  # fmt: skip

        targets = self.targets
        if targets is not None:
            hidden = {key: move_hidden(value) for key, value in targets.hidden.items()}
            targets = replace(targets, logits=move(targets.logits), hidden=hidden)
        inputs = {name: move(tensor) for name, tensor in self.inputs.items()}
        return Batch(inputs, move(self.labels), self.text_ids, targets)

    def split(self, pieces: int) -> tuple[Batch, ...]:
        """At most ``pieces`` micro-batches of near-equal row counts, in row order, each padded to its own longest row.

        Meant for the host, before ``to``: it looks at values, which on a GPU would wait for the device.
        """
        pieces = min(pieces, len(self))
        if pieces <= 1:
            return (self,)
        borders = np.linspace(0, len(self), pieces + 1).round().astype(int)
        return tuple(self._rows(int(first), int(last)) for first, last in itertools.pairwise(borders))

    def _rows(self, first: int, last: int) -> Batch:
        length = self.inputs["attention_mask"].shape[1]
        longest = int(self.inputs["attention_mask"][first:last].sum(dim=1).max())
        inputs = {name: tensor[first:last, :longest] for name, tensor in self.inputs.items()}
        targets = self.targets
        if targets is not None:
            shared: dict[int, _Piece] = {}
            hidden: dict[tuple[int, int], Hidden] = {}
            for key, value in targets.hidden.items():
                piece = shared.get(id(value.positions))
                if piece is None:
                    piece = shared[id(value.positions)] = _cut(value, first, last, length, longest)
                values, scales = value.values[piece.tokens], None if value.scales is None else value.scales[piece.tokens]
                hidden[key] = Hidden(
                    values, scales, piece.src, piece.dst, piece.weight, piece.positions, value.decoder, piece.bags
                )
            targets = Targets(targets.teachers, targets.logits[:, first:last], hidden)
        return Batch(inputs, self.labels[first:last], self.text_ids[first:last], targets)


@dataclass(frozen=True, eq=False)
class _Piece:
    """The part of an alignment that belongs to some rows: teacher tokens as a slice, the rest as in ``Hidden``."""

    tokens: slice
    src: Tensor | None
    dst: Tensor | None
    weight: Tensor | None
    positions: Tensor
    bags: Tensor | None = None


def _cut(hidden: Hidden, first: int, last: int, length: int, longest: int) -> _Piece:
    low, high = torch.searchsorted(hidden.positions, torch.tensor([first * length, last * length])).tolist()
    flat = hidden.positions[low:high]
    row = torch.div(flat, length, rounding_mode="floor")
    positions = (row - first) * longest + (flat - row * length)
    if hidden.bags is not None:
        return _Piece(slice(first, last), None, None, None, positions, hidden.bags[first:last] - low)
    if hidden.src is None or hidden.dst is None or hidden.weight is None:
        return _Piece(slice(low, high), None, None, None, positions)
    begin, end = torch.searchsorted(hidden.dst, torch.tensor([low, high])).tolist()
    src = hidden.src[begin:end]
    bounds = (int(src.min()), int(src.max()) + 1) if len(src) else (0, 0)
    return _Piece(slice(*bounds), src - bounds[0], hidden.dst[begin:end] - low, hidden.weight[begin:end], positions)


class TargetSource(Protocol):
    """Where batches come from. ``layer`` below is the teacher's own layer number, as in ``layer_map``.

    ``layer_map`` gives, per teacher, one teacher layer for each student layer 1..K; it is empty where no hidden states are
    asked for. ``coverage`` is, per teacher, the share of student tokens that have a target, over what was read so far;
    ``skipped`` counts the rows left out because the cache lacks them.
    """

    teachers: tuple[str, ...]
    layer_map: dict[str, tuple[int, ...]]
    skipped: int

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def coverage(self) -> dict[str, float]: ...

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """One process's share of every global batch of ``epoch`` from ``first_step`` on."""
        ...

    def target_dim(self, teacher: str, layer: int) -> int: ...

    def target_variance(self, teacher: str, layer: int) -> float:
        """Mean over dimensions of the variance over tokens of the target."""
        ...

    def logits_for(self, split: str) -> Tensor:
        """Teachers' logits of every example of ``split`` in its order, [N, n, C] float32."""
        ...
