"""The seam between where teacher targets come from and who learns from them.

A trainer takes batches from a ``TargetSource``. Targets read from a cache (``CachedBatches``) and targets of teachers
that run on every batch (``LiveBatches``) look the same, so tests can compare the two. Targets are packed, never padded,
and stay in their stored dtype until they are on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from kdcache.codecs.base import Decoder
    from kdcache.methods.parts.layer_map import LayerMap
    from kdcache.training.processes import Processes


@dataclass(frozen=True, eq=False)
class Hidden:
    """Hidden states of one teacher layer for the student tokens of one batch.

    Layers of a teacher that are stored for the same tokens share the index tensors, as the same objects.

    Attributes:
        values: One row per teacher token, in the stored dtype: [S, dim], or codes [S, ...] for ``decoder``.
        scales: [S]; a target is its value times its scale. None: no scales.
        src: The target of covered student token p (of P) is the sum of weight[n] * values[src[n]] over its entries n,
            which run from first[p] to first[p + 1], for the last token to the end. Every token has at least one entry.
            None means the identity: S = P, and the target of token p is values[p].
        first: [P], see ``src``.
        weight: float32, see ``src``.
        positions: [P], ascending: flat indices b * L + t of the covered tokens in the student's [B, L]. Tokens that no
            teacher token overlaps are not among them.
        decoder: Decodes ``values`` to [S, dim]; None where they are numbers.
        bags: [P], for targets that are the mean of a text's tokens: where the positions of each row begin.
        bag_rows: [P], the row of the batch that each bag is; None means that every row has one.

    Targets per text need no alignment: S = P, the number of rows with a target. For the first token ``positions`` are
    the first tokens of the student in these rows; for the mean they are all their tokens. Rows of texts that are stored
    with logits only have no target, so a batch may have none at all: S = P = 0.
    """

    values: Tensor
    scales: Tensor | None
    src: Tensor | None
    first: Tensor | None
    weight: Tensor | None
    positions: Tensor
    decoder: Decoder | None = None
    bags: Tensor | None = None
    bag_rows: Tensor | None = None

    @property
    def count(self) -> int:
        """P, the number of student vectors with a target."""
        return len(self.positions) if self.bags is None else len(self.bags)

    def rows(self, length: int) -> Tensor:
        """The row of the batch, padded to ``length``, that each of the P targets belongs to."""
        if self.bags is None:
            return self.positions // length
        return torch.arange(self.count, device=self.bags.device) if self.bag_rows is None else self.bag_rows

    def of_student(self, states: Tensor) -> Tensor:
        """The student vectors that the targets are for: [P, width] out of ``states`` [B * L, width]."""
        if self.bags is None:
            return states.index_select(0, self.positions)
        if not len(self.bags):
            return states.new_zeros((0, states.shape[1]), dtype=torch.float32)
        return torch.nn.functional.embedding_bag(self.positions, states.float(), self.bags, mode="mean")

    def aligned(self) -> Tensor:
        """The targets of the covered student tokens, [P, dim] float32, on the device of the values. No gradient flows.

        Sums go through ``embedding_bag``: several times faster than ``index_add`` and, unlike it, deterministic on a
        GPU.
        """
        values = self.values.to(torch.float32) if self.decoder is None else self.decoder(self.values)
        if self.src is None or self.first is None or self.weight is None:
            return values if self.scales is None else values * self.scales[:, None]
        if not len(self.positions):
            return values.new_empty(0, values.shape[1])
        weight = self.weight if self.scales is None else self.weight * self.scales[self.src]
        return torch.nn.functional.embedding_bag(self.src, values, self.first, mode="sum", per_sample_weights=weight)


class AlignmentIndices(NamedTuple):
    """The alignment of one batch with one teacher: the fields of ``Hidden`` without the values."""

    positions: Tensor
    src: Tensor | None = None
    first: Tensor | None = None
    weight: Tensor | None = None
    bags: Tensor | None = None
    bag_rows: Tensor | None = None

    def to(self, device: torch.device) -> AlignmentIndices:
        """The same alignment on ``device``."""
        return AlignmentIndices(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]

    def target(self, values: Tensor, scales: Tensor | None, decoder: Decoder | None) -> Hidden:
        """The targets that ``values`` are for this alignment."""
        return Hidden(
            values, scales, self.src, self.first, self.weight, self.positions, decoder, self.bags, self.bag_rows
        )


@dataclass(frozen=True, eq=False)
class Targets:
    """The outputs of N teachers for one batch.

    ``logits`` is [N, B, C] float32 in the order of ``teachers``, with C = 0 where the source was asked for none;
    ``hidden`` is keyed by (teacher index, student layer 1..K) and empty where the source was asked for none.
    """

    teachers: tuple[str, ...]
    logits: Tensor
    hidden: dict[tuple[int, int], Hidden]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one step.

    The student's ``inputs`` [B, L], ``labels`` [B] (-1 = none), ids uint8[B, 16], and the targets.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    text_ids: np.ndarray
    targets: Targets | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states, nearly all of a batch."""
        hidden = self.targets.hidden.values() if self.targets is not None else ()
        return sum(states.values.nbytes for states in hidden)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; to an accelerator, all tensors go there in one copy."""
        device = torch.device(device)
        if device.type == "cpu":
            return self.mapped(lambda tensor: tensor.to(device))
        from kdcache.loading.transfer import pack

        (batch,) = pack([self], pin=device.type == "cuda").to(device)
        return batch

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each tensor changed; a tensor that several layers share is changed once."""
        changed: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in changed:
                changed[id(tensor)] = change(tensor)
            return changed[id(tensor)]

        def if_any(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else once(tensor)

        def hidden_of(h: Hidden) -> Hidden:
            others = (h.src, h.first, h.weight, h.bags, h.bag_rows)
            alignment = AlignmentIndices(once(h.positions), *map(if_any, others))
            return alignment.target(once(h.values), if_any(h.scales), h.decoder)

        targets = self.targets
        if targets is not None:
            hidden = {key: hidden_of(value) for key, value in targets.hidden.items()}
            targets = replace(targets, logits=once(targets.logits), hidden=hidden)
        inputs = {name: once(tensor) for name, tensor in self.inputs.items()}
        return Batch(inputs, once(self.labels), self.text_ids, targets)

    def split(self, pieces: int) -> tuple[Batch, ...]:
        """At most ``pieces`` micro-batches of near-equal row counts, in row order, each padded to its own longest row.

        Call it on the host, before ``to``: it reads values, which on a GPU would wait for the device.
        """
        pieces = min(pieces, len(self))
        if pieces <= 1:
            return (self,)
        borders = np.linspace(0, len(self), pieces + 1).round().astype(int)
        mask = self.inputs["attention_mask"]
        ends = (mask.numpy() * np.arange(1, mask.shape[1] + 1)).max(axis=1)  # last token + 1 of each row
        longest = np.maximum.reduceat(ends.astype(np.int64), borders[:-1])  # no piece is empty
        targets: Sequence[Targets | None] = [None] * pieces
        if self.targets is not None:
            targets = _Cuts(borders, longest, mask.shape[1]).targets(self.targets)
        spans = zip(itertools.pairwise(borders.tolist()), longest.tolist(), targets, strict=True)
        return tuple(
            Batch(
                {name: tensor[first:last, :width] for name, tensor in self.inputs.items()},
                self.labels[first:last],
                self.text_ids[first:last],
                part,
            )
            for (first, last), width, part in spans
        )


_Piece = tuple[slice, AlignmentIndices]  # of some rows of a batch: their teacher tokens, and their alignment


@dataclass(frozen=True, eq=False)
class _Cuts:
    """A batch cut at rows ``borders`` [n + 1] into pieces padded to ``longest`` [n]; it was padded to ``length``.

    Indices of all pieces are computed at once in numpy and then sliced: a slice costs a microsecond, a small torch
    operation several.
    """

    borders: np.ndarray
    longest: np.ndarray
    length: int

    def targets(self, whole: Targets) -> list[Targets]:
        alignments: dict[int, list[_Piece]] = {}  # by the alignment, which layers share
        hidden: list[dict[tuple[int, int], Hidden]] = [{} for _ in self.longest]
        for key, value in whole.hidden.items():
            if id(value.positions) not in alignments:
                alignments[id(value.positions)] = self._alignment(value)
            for own, (tokens, indices) in zip(hidden, alignments[id(value.positions)], strict=True):
                scales = None if value.scales is None else value.scales[tokens]
                own[key] = indices.target(value.values[tokens], scales, value.decoder)
        logits = whole.logits.split(np.diff(self.borders).tolist(), dim=1)
        return [Targets(whole.teachers, *own) for own in zip(logits, hidden, strict=True)]

    def _alignment(self, hidden: Hidden) -> list[_Piece]:
        device = hidden.positions.device  # live teachers may run on a GPU
        flat = hidden.positions.cpu().numpy()
        places = np.searchsorted(flat, self.borders * self.length)  # of each piece among the student tokens
        piece = np.repeat(np.arange(len(self.longest)), np.diff(places))
        row = flat // self.length
        moved = (row - self.borders[piece]) * self.longest[piece] + (flat - row * self.length)
        positions = _slices(moved, places, device)
        if hidden.bags is not None:
            return self._bags(hidden.bags.cpu().numpy(), hidden.bag_rows, places, positions)
        if hidden.src is None or hidden.first is None or hidden.weight is None:
            return [(span, AlignmentIndices(own)) for span, own in zip(_spans(places), positions, strict=True)]
        return self._entries(hidden.src, hidden.first, hidden.weight, places, positions)

    def _bags(
        self, bags: np.ndarray, bag_rows: Tensor | None, places: np.ndarray, positions: Sequence[Tensor]
    ) -> list[_Piece]:
        device, rows = positions[0].device, None if bag_rows is None else bag_rows.cpu().numpy()
        borders = self.borders if rows is None else np.searchsorted(rows, self.borders)  # of each piece among the bags
        begins = _slices(bags - np.repeat(places[:-1], np.diff(borders)), borders, device)
        of_pieces: Sequence[Tensor | None] = [None] * len(positions)
        if rows is not None:
            of_pieces = _slices(rows - np.repeat(self.borders[:-1], np.diff(borders)), borders, device)
        columns = zip(_spans(borders), positions, begins, of_pieces, strict=True)
        return [(span, AlignmentIndices(own, bags=bag, bag_rows=row)) for span, own, bag, row in columns]

    def _entries(
        self, src: Tensor, first: Tensor, weight: Tensor, places: np.ndarray, positions: Sequence[Tensor]
    ) -> list[_Piece]:
        device, begins, source = src.device, first.cpu().numpy(), src.cpu().numpy()
        bounds = np.append(begins, len(source))[places]  # of each piece among the entries
        sizes = np.diff(bounds)
        low, high = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)  # teacher tokens of each piece
        some = np.flatnonzero(sizes)
        if len(some):
            low[some] = np.minimum.reduceat(source, bounds[:-1][some])
            high[some] = np.maximum.reduceat(source, bounds[:-1][some]) + 1
        tokens = [slice(*span) for span in zip(low.tolist(), high.tolist(), strict=True)]
        moved = _slices(source - np.repeat(low, sizes), bounds, device)
        starts = _slices(begins - np.repeat(bounds[:-1], np.diff(places)), places, device)
        columns = (positions, moved, starts, weight.split(sizes.tolist()))
        return [(span, AlignmentIndices(*own)) for span, *own in zip(tokens, *columns, strict=True)]


def _slices(array: np.ndarray, bounds: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = torch.from_numpy(array).to(device).split(np.diff(bounds).tolist())
    return pieces


def _spans(bounds: np.ndarray) -> list[slice]:
    return [slice(*span) for span in itertools.pairwise(bounds.tolist())]


class TargetSource(Protocol):
    """A source of batches. ``layer`` below is the teacher's own layer number, as in ``layer_map``.

    Attributes:
        teachers: Names, in the order of ``Targets.logits``.
        layer_map: Per teacher one teacher layer for each student layer 1..K, or None for one without partner. If the
            map changes from epoch to epoch: all layers that it draws from. Empty without hidden states.
        skipped: Rows left out because the cache lacks their text.
        steps_per_epoch: Steps of an epoch, the same in every process.
        coverage: Per teacher, the share of student tokens with a target, over what was read so far.
        truncated: The share of the texts read so far that are cut to the student's max_length; None before any.
    """

    teachers: tuple[str, ...]
    layer_map: LayerMap
    skipped: int

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def coverage(self) -> dict[str, float]: ...

    @property
    def truncated(self) -> float | None: ...

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """One process's share of every global batch of ``epoch`` from ``first_step`` on.

        If it has no row of the last step, there is no batch for that step.
        """
        ...

    def count_together(self, processes: Processes) -> None:
        """From here on ``coverage`` and ``truncated`` are over what all processes read. Called once, by all of them."""
        ...

    def layers_at(self, epoch: int) -> LayerMap:
        """The layer map of an epoch."""
        ...

    def target_dim(self, teacher: str, layer: int) -> int: ...

    def target_variance(self, teacher: str, layer: int) -> float:
        """Mean over dimensions of the variance over tokens of the target."""
        ...

    def logits_for(self, split: str) -> Tensor:
        """Teachers' logits of every example of ``split`` in its order, [N, n, C] float32."""
        ...
