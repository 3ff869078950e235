"""Batches from decoded parts: what rows need is looked up for many steps at once, then their bytes are copied step by step.

The values of hidden states, which are nearly all of the bytes, are copied once, row by row, when the turn of their step comes:
so a run of steps takes no more memory than its indices. Whether the rows come from the parts of a cache or from teachers
that ran a moment ago, alignments become indices here and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kdcache.distill.interleave import joined, layers_of
from kdcache.distill.rows import Ragged, Sheets, cut
from kdcache.distill.targets import Hidden, Targets

if TYPE_CHECKING:
    import torch

    from kdcache.codecs.base import Decoder, TokenSelection
    from kdcache.distill.forms import Forms


def student_inputs(sheets: Sheets, pad_token_id: int) -> list[dict[str, torch.Tensor]]:
    """Per step ``input_ids``, ``attention_mask`` and, where the student takes them, ``token_type_ids``: int64 [B, L], padded right."""
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
    """The same for targets per text, which need no alignment: the student's first tokens, or all of them in a bag per row."""
    if tokens == "pooled":
        bags = sheets.per_row(sheets.starts(sheets.tokens.offsets))
        return [Pieces(positions, bags=bag) for positions, bag in zip(sheets.per_token(sheets.positions), bags, strict=True)]
    return [Pieces(positions) for positions in sheets.per_row(sheets.first_tokens)]


def cached_targets(
    sheets: Sheets, teachers: tuple[str, ...], layer_map: Mapping[str, tuple[int | None, ...]], forms: Forms
) -> Iterator[Targets]:
    """The targets of every step out of decoded parts; values stay in the dtype in which they were stored."""
    cards = sheets.rows.cards
    logits = cards["logits"] if "logits" in (cards.dtype.names or ()) else np.empty((len(cards), len(teachers), 0), np.float32)
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
