"""Where the rows of a run of steps lie: in which parts, where in their packed arrays, and where in the padded tables of
their steps.

All of it is index arithmetic in numpy, done once for a run of steps, because it costs nearly the same for one step as
for thirty.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from kdcache.loader.alignment import ranges
from kdcache.loader.parts import fields_of, joined, layers_of
from kdcache.loader.targets import Hidden, Targets

if TYPE_CHECKING:
    from kdcache.codecs.base import Decoder, TokenSelection
    from kdcache.loader.choice import Forms
    from kdcache.loader.parts import DecodedPart


class Rows:
    """The rows of consecutive steps: row r is text ``texts[r]`` of ``parts[part_of[r]]``, step s has rows ``edges[s]``
    to ``edges[s + 1]``.

    ``cards`` [rows] are those of the texts, with the fields of ``DecodedPart.cards``.
    """

    def __init__(
        self,
        parts: Sequence[DecodedPart],
        part_of: np.ndarray,
        texts: np.ndarray,
        edges: np.ndarray,  # int64[steps + 1]
        cards: np.ndarray | None = None,  # as bytes
    ) -> None:
        self.parts, self.part_of, self.texts, self.edges = parts, part_of, texts, edges
        self._cards = self.per_text([part.cards.rows for part in parts]) if cards is None else cards
        self.cards = fields_of(self._cards, parts[0].cards.dtype)

    def __len__(self) -> int:
        return len(self.texts)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Rows of each step."""
        return np.diff(self.edges)

    def longest_first(self) -> np.ndarray:
        """The rows of every step by falling length, so that micro-batches are of like length and hold little padding."""
        spans = self.cards["tokens"]
        lengths, step = spans[:, 1] - spans[:, 0], np.repeat(np.arange(len(self.counts)), self.counts)
        return np.argsort(step * (int(lengths.max(initial=0)) + 1) - lengths, kind="stable")

    def take(self, order: np.ndarray) -> Rows:
        """The same steps with rows in another order."""
        return Rows(self.parts, self.part_of[order], self.texts[order], self.edges, self._cards.take(order, axis=0))

    def per_text(self, arrays: Sequence[np.ndarray], beyond: int = 0) -> np.ndarray:
        """Entry ``texts[r] + beyond`` of an array per part, for every row r."""
        by_part, borders = self.by_part
        texts = self.texts[by_part] + beyond
        taken = [array.take(texts[first:last], axis=0) for array, (first, last) in zip(arrays, borders, strict=True)]
        back = np.empty(len(self), np.int64)
        back[by_part] = np.arange(len(self))
        return np.concatenate(taken).take(back, axis=0)

    @functools.cached_property
    def by_part(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The rows part by part, and from where to where those of each part are."""
        upto = np.cumsum(np.bincount(self.part_of, minlength=len(self.parts)))
        short = self.part_of.astype(np.uint16) if len(self.parts) < 1 << 16 else self.part_of  # sorted by digits
        return np.argsort(short, kind="stable"), list(itertools.pairwise([0, *upto.tolist()]))


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Places by falling length; equal ones keep their order."""
    return np.argsort(-lengths, kind="stable")


class Ragged:
    """Where tokens of ``rows`` lie in the packed arrays of their parts: from ``starts`` to ``ends``."""

    def __init__(self, rows: Rows, starts: np.ndarray, ends: np.ndarray) -> None:
        self.rows, self._starts, self._ends = rows, starts, ends
        self.lengths = ends - starts

    @classmethod
    def listed(cls, rows: Rows, field: str) -> Ragged:
        """As the cards of the texts say under ``field``."""
        return cls(rows, *np.ascontiguousarray(rows.cards[field].T))

    @classmethod
    def of(cls, rows: Rows, offsets: Sequence[np.ndarray]) -> Ragged:
        """By one offsets array [texts + 1] per part."""
        return cls(rows, rows.per_text(offsets), rows.per_text(offsets, 1))

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64[rows + 1]: where the rows begin when they are packed one after the other."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def spans(self, size: int) -> list[tuple[int, int, int]]:
        """Of each row its part, and from which to which byte it lies there, a token taking ``size`` bytes."""
        starts, ends = (np.multiply(one, size, dtype=np.int64).tolist() for one in (self._starts, self._ends))
        return list(zip(self.rows.part_of.tolist(), starts, ends, strict=True))

    def pick(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The packed values of all rows, in row order, from one packed array per part.

        Token by token, since a token has a few bytes only.
        """
        by_part, borders = self.rows.by_part
        lengths = self.lengths[by_part]
        upto, places = np.concatenate([[0], np.cumsum(lengths)]), ranges(self._starts[by_part], lengths)
        taken = [
            array.take(places[upto[first] : upto[last]], axis=0)
            for array, (first, last) in zip(arrays, borders, strict=True)
        ]
        found = np.empty((len(places), *arrays[0].shape[1:]), arrays[0].dtype)
        found[ranges(self.offsets[:-1][by_part], lengths)] = np.concatenate(taken)
        return found


class Sheets:
    """The student's tokens as padded tables [B, L], one for each step, which lie one after the other in flat arrays."""

    def __init__(self, rows: Rows) -> None:
        tokens = Ragged.listed(rows, "tokens")
        longest = np.maximum.reduceat(tokens.lengths, rows.edges[:-1])  # no step is empty
        self.rows, self.tokens = rows, tokens
        self.shapes = list(zip(rows.counts.tolist(), longest.tolist(), strict=True))
        sizes = rows.counts * longest
        self._spans = list(itertools.pairwise([0, *np.cumsum(sizes).tolist()]))
        self._borders = tokens.offsets[rows.edges]  # of the steps among the tokens
        row = np.arange(len(rows)) - np.repeat(rows.edges[:-1], rows.counts)
        self.first_tokens = row * np.repeat(longest, rows.counts)
        self.positions = ranges(self.first_tokens, tokens.lengths)  # b * L + t of every token
        self._places = self.positions + np.repeat(np.cumsum(sizes) - sizes, np.diff(self._borders))
        if all(part.plain for part in rows.parts):
            self.ids, self.types, self.counts = tokens.pick([part.student.input_ids for part in rows.parts]), None, None
        else:
            records = tokens.pick([part.records for part in rows.parts])
            self.ids, self.types, self.counts = records[:, 0], records[:, 1], records[:, 2:]

    def padded(self, values: np.ndarray | int, filler: int) -> list[torch.Tensor]:
        """int64 [B, L] of each step: ``values`` where there is a token, ``filler`` beyond."""
        flat = np.full(self._spans[-1][1], filler, np.int64)
        flat[self._places] = values
        return [
            torch.from_numpy(flat[first:last].reshape(shape))
            for (first, last), shape in zip(self._spans, self.shapes, strict=True)
        ]

    def zeros(self) -> list[torch.Tensor]:
        """0 everywhere, one for all."""
        zero = np.zeros(max(last - first for first, last in self._spans), np.int64)
        return [
            torch.from_numpy(zero[: last - first].reshape(shape))
            for (first, last), shape in zip(self._spans, self.shapes, strict=True)
        ]

    def per_token(self, array: np.ndarray) -> list[torch.Tensor]:
        """What an array of one entry per token holds for each step."""
        return cut(array, self._borders)

    def per_row(self, array: np.ndarray) -> list[torch.Tensor]:
        """What an array of one entry per row holds for each step."""
        return cut(array, self.rows.edges)

    def starts(self, offsets: np.ndarray) -> np.ndarray:
        """Per row, where its tokens begin among those of its step. ``offsets`` [rows + 1] counts through all steps."""
        begins: np.ndarray = offsets[:-1] - np.repeat(offsets[self.rows.edges[:-1]], self.rows.counts)
        return begins


def numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones of small non-negative ``values``, ascending, and which of them each value is."""
    distinct = np.flatnonzero(np.bincount(values))
    place = np.empty(int(distinct[-1]) + 1, np.int64)
    place[distinct] = np.arange(len(distinct))
    return distinct, place[values]


def cut(array: np.ndarray, borders: np.ndarray, axis: int = 0) -> list[torch.Tensor]:
    """The pieces of an array between ``borders``, as tensors that share its memory."""
    return list(torch.from_numpy(array).split(np.diff(borders).tolist(), dim=axis))


def student_inputs(sheets: Sheets, pad_token_id: int) -> list[dict[str, torch.Tensor]]:
    """Per step ``input_ids``, ``attention_mask`` and, where the student takes them, ``token_type_ids``.

    Int64 [B, L], padded right.
    """
    inputs = {"input_ids": sheets.padded(sheets.ids, pad_token_id), "attention_mask": sheets.padded(1, 0)}
    if all(part.student.token_type_ids is not None for part in sheets.rows.parts):
        inputs["token_type_ids"] = sheets.zeros() if sheets.types is None else sheets.padded(sheets.types, 0)
    return [dict(zip(inputs, tables, strict=True)) for tables in zip(*inputs.values(), strict=True)]


class Pieces(NamedTuple):
    """The alignment of a batch, as ``Hidden`` wants it, without the values."""

    positions: torch.Tensor
    src: torch.Tensor | None = None
    first: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bags: torch.Tensor | None = None

    def to(self, device: torch.device) -> Pieces:
        return Pieces(*(None if one is None else one.to(device) for one in self))  # type: ignore[arg-type]

    def target(self, values: torch.Tensor, scales: torch.Tensor | None, decoder: Decoder | None) -> Hidden:
        """The targets that ``values`` of this alignment are."""
        return Hidden(values, scales, self.src, self.first, self.weight, self.positions, decoder, self.bags)


def alignment_pieces(sheets: Sheets, teacher: int) -> tuple[Ragged, list[Pieces]]:
    """Where a teacher's tokens lie, and its alignment of whole parts cut down to the rows of each step."""
    rows, said = sheets.rows, [part.teachers[teacher] for part in sheets.rows.parts]
    if sheets.counts is None or all(one.alignment is not None and one.alignment.identical for one in said):
        return sheets.tokens, [Pieces(positions) for positions in sheets.per_token(sheets.positions)]
    parts = [part.explicit[teacher] for part in rows.parts]
    tokens = Ragged.listed(rows, f"tokens {teacher}")
    entries = Ragged.of(rows, [part.texts for part in parts])
    found, counts = entries.pick([part.entries for part in parts]), sheets.counts[:, teacher]
    src = found[:, 0] + np.repeat(sheets.starts(tokens.offsets), entries.lengths)
    weight = found.view(np.float32)[:, 1].copy()
    covered, upto = np.flatnonzero(counts), np.cumsum(counts)
    of_entries = entries.offsets[rows.edges]
    of_tokens = np.searchsorted(covered, sheets.tokens.offsets[rows.edges])
    first = (upto - counts)[covered] - np.repeat(of_entries[:-1], np.diff(of_tokens))
    columns = (
        cut(sheets.positions[covered], of_tokens),
        cut(src, of_entries),
        cut(first, of_tokens),
        cut(weight, of_entries),
    )
    return tokens, [Pieces(*one) for one in zip(*columns, strict=True)]


def text_pieces(tokens: TokenSelection, sheets: Sheets) -> list[Pieces]:
    """The same for targets per text, which need no alignment.

    The student's first tokens, or all of them in a bag per row.
    """
    if tokens == "pooled":
        bags = sheets.per_row(sheets.starts(sheets.tokens.offsets))
        return [
            Pieces(positions, bags=bag) for positions, bag in zip(sheets.per_token(sheets.positions), bags, strict=True)
        ]
    return [Pieces(positions) for positions in sheets.per_row(sheets.first_tokens)]


def cached_targets(
    sheets: Sheets, teachers: tuple[str, ...], layer_map: Mapping[str, tuple[int | None, ...]], forms: Forms
) -> Iterator[Targets]:
    """The targets of every step out of decoded parts; values stay in the dtype in which they were stored."""
    cards = sheets.rows.cards
    logits = (
        cards["logits"]
        if "logits" in (cards.dtype.names or ())
        else np.empty((len(cards), len(teachers), 0), np.float32)
    )
    by_step = cut(np.ascontiguousarray(logits.swapaxes(0, 1)), sheets.rows.edges, axis=1)
    groups = [
        _Layers.of(sheets, index, name, tokens, forms)
        for index, name in enumerate(teachers)
        for tokens in sheets.rows.parts[0].teachers[index].hidden
    ]
    wanted = {
        (index, student_layer): (name, layer)
        for index, name in enumerate(teachers)
        for student_layer, layer in enumerate(layer_map.get(name, ()), start=1)
        if layer is not None
    }
    for step, (first, last) in enumerate(itertools.pairwise(sheets.rows.edges.tolist())):
        made: dict[tuple[str, int], Hidden] = {}
        for group in groups:
            made |= group.targets(step, first, last)
        yield Targets(teachers, by_step[step], {key: made[stored] for key, stored in wanted.items()})


@dataclass(frozen=True, eq=False)
class _Layers:
    """Those of a teacher's layers that are stored for the same tokens, for the rows of a run."""

    teacher: str
    spans: list[tuple[int, int, int]]
    counts: list[int]
    pieces: list[Pieces]
    parts: list[memoryview]
    dtype: np.dtype
    forms: Forms

    @classmethod
    def of(cls, sheets: Sheets, index: int, teacher: str, selected: TokenSelection, forms: Forms) -> _Layers:
        parts = [part.teachers[index].hidden[selected] for part in sheets.rows.parts]
        if selected == "all":
            tokens, pieces = alignment_pieces(sheets, index)
        else:  # a text has one row
            texts = sheets.rows.texts
            tokens, pieces = Ragged(sheets.rows, texts, texts + 1), text_pieces(selected, sheets)
        counts = np.diff(tokens.offsets[sheets.rows.edges]).tolist()
        dtype = parts[0].dtype
        return cls(teacher, tokens.spans(dtype.itemsize), counts, pieces, [part.bytes for part in parts], dtype, forms)

    def targets(self, step: int, first: int, last: int) -> dict[tuple[str, int], Hidden]:
        """By teacher and layer, for the rows from ``first`` to ``last``, which are those of ``step``."""
        rows = joined(self.parts, self.spans[first:last], self.counts[step], self.dtype.itemsize)
        piece = self.pieces[step]
        return {
            (self.teacher, layer): piece.target(values, scales, self.forms[self.teacher, layer].decoder)
            for layer, (values, scales) in layers_of(rows, self.dtype).items()
        }
