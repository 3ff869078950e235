"""From decoded parts to batches: where rows lie in the packed arrays of parts, and where in the padded batches.

    DecodedPart -> StepRows -> PaddedBatches, AlignmentIndices -> Batch (Targets, Hidden)

All of it is index arithmetic in numpy. It is done for a run of consecutive steps at once, because it costs nearly the
same for one step as for thirty.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.loading.alignment import ranges
from kdcache.loading.parts import fields_of, gather_spans, layers_of
from kdcache.loading.targets import AlignmentIndices, Targets

if TYPE_CHECKING:
    from kdcache.codecs.base import TokenSelection
    from kdcache.loading.choice import StoredFormats
    from kdcache.loading.parts import DecodedPart
    from kdcache.loading.targets import Hidden
    from kdcache.methods.parts.layer_map import LayerMap


class StepRows:
    """The rows of consecutive steps.

    Row r is text ``texts[r]`` of ``parts[part_of[r]]``; step s has the rows from ``edges[s]`` to ``edges[s + 1]``.
    ``text_records`` [rows] has the fields of ``DecodedPart.text_records``.
    """

    def __init__(
        self,
        parts: Sequence[DecodedPart],
        part_of: np.ndarray,
        texts: np.ndarray,
        edges: np.ndarray,  # int64[steps + 1]
        records: np.ndarray | None = None,  # as bytes
    ) -> None:
        self.parts, self.part_of, self.texts, self.edges = parts, part_of, texts, edges
        self._records = self.per_text([part.text_records.rows for part in parts]) if records is None else records
        self.text_records = fields_of(self._records, parts[0].text_records.dtype)

    def __len__(self) -> int:
        return len(self.texts)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Rows of each step."""
        return np.diff(self.edges)

    @functools.cached_property
    def with_hidden(self) -> np.ndarray | None:
        """Which rows have hidden states, bool[rows]; None if all have."""
        logits_only = np.array([part.logits_only for part in self.parts])
        return ~logits_only[self.part_of] if logits_only.any() else None

    def longest_first(self) -> np.ndarray:
        """The rows of every step by falling length: rows of like length share a micro-batch, with little padding."""
        spans = self.text_records["tokens"]
        lengths, step = spans[:, 1] - spans[:, 0], np.repeat(np.arange(len(self.counts)), self.counts)
        return np.argsort(step * (int(lengths.max(initial=0)) + 1) - lengths, kind="stable")

    def take(self, order: np.ndarray) -> StepRows:
        """The same steps with rows in another order."""
        return StepRows(
            self.parts, self.part_of[order], self.texts[order], self.edges, self._records.take(order, axis=0)
        )

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


class TokenSpans:
    """The tokens of each row, as a span of the packed arrays of its part: from ``starts`` to ``ends``."""

    def __init__(self, rows: StepRows, starts: np.ndarray, ends: np.ndarray) -> None:
        self.rows, self._starts, self._ends = rows, starts, ends
        self.lengths = ends - starts

    @classmethod
    def listed(cls, rows: StepRows, field: str) -> TokenSpans:
        """By ``field`` of the rows' text records."""
        return cls(rows, *np.ascontiguousarray(rows.text_records[field].T))

    @classmethod
    def of(cls, rows: StepRows, offsets: Sequence[np.ndarray]) -> TokenSpans:
        """By one offsets array [texts + 1] per part."""
        return cls(rows, rows.per_text(offsets), rows.per_text(offsets, 1))

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64[rows + 1]: where the rows begin when they are packed one after the other."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def spans(self, size: int) -> list[tuple[int, int, int]]:
        """(part, first byte, last byte + 1) of each row, where a token takes ``size`` bytes."""
        starts, ends = (np.multiply(places, size, dtype=np.int64).tolist() for places in (self._starts, self._ends))
        return list(zip(self.rows.part_of.tolist(), starts, ends, strict=True))

    def pick(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The packed values of all rows, in row order, from one packed array per part; for values of a few bytes."""
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


class PaddedBatches:
    """The student's tokens of each step as a padded batch [B, L]; flat arrays hold the batches one after the other."""

    def __init__(self, rows: StepRows) -> None:
        tokens = TokenSpans.listed(rows, "tokens")
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
            records = tokens.pick([part.token_records for part in rows.parts])
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
        """int64 [B, L] of zeros for each step, which share memory."""
        zero = np.zeros(max(last - first for first, last in self._spans), np.int64)
        return [
            torch.from_numpy(zero[: last - first].reshape(shape))
            for (first, last), shape in zip(self._spans, self.shapes, strict=True)
        ]

    def per_token(self, array: np.ndarray) -> list[torch.Tensor]:
        """An array of one entry per token, cut into steps."""
        return cut(array, self._borders)

    def per_row(self, array: np.ndarray) -> list[torch.Tensor]:
        """An array of one entry per row, cut into steps."""
        return cut(array, self.rows.edges)

    def starts(self, offsets: np.ndarray) -> np.ndarray:
        """Where the tokens of each row begin within its step; ``offsets`` [rows + 1] run through all steps."""
        begins: np.ndarray = offsets[:-1] - np.repeat(offsets[self.rows.edges[:-1]], self.rows.counts)
        return begins


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, ascending, and the index of each value among them; for small non-negative integers."""
    numbers = np.flatnonzero(np.bincount(values))
    place = np.empty(int(numbers[-1]) + 1, np.int64)
    place[numbers] = np.arange(len(numbers))
    return numbers, place[values]


def cut(array: np.ndarray, borders: np.ndarray, axis: int = 0) -> list[torch.Tensor]:
    """The pieces of an array between ``borders``, as tensors that share its memory."""
    return list(torch.from_numpy(array).split(np.diff(borders).tolist(), dim=axis))


def student_inputs(padded: PaddedBatches, pad_token_id: int) -> list[dict[str, torch.Tensor]]:
    """Per step ``input_ids``, ``attention_mask`` and, if the student takes them, ``token_type_ids``: int64 [B, L]."""
    inputs = {"input_ids": padded.padded(padded.ids, pad_token_id), "attention_mask": padded.padded(1, 0)}
    if all(part.student.token_type_ids is not None for part in padded.rows.parts):
        inputs["token_type_ids"] = padded.zeros() if padded.types is None else padded.padded(padded.types, 0)
    return [dict(zip(inputs, tables, strict=True)) for tables in zip(*inputs.values(), strict=True)]


def token_indices(padded: PaddedBatches, teacher: int) -> tuple[TokenSpans, list[AlignmentIndices]]:
    """Where a teacher's tokens lie, and its alignment with the student's tokens for each step."""
    rows, keep = padded.rows, padded.rows.with_hidden
    alignments = [part.teachers[teacher].alignment for part in rows.parts if not part.logits_only]
    identical = padded.counts is None or all(one is not None and one.identical for one in alignments)
    if identical and keep is None:
        return padded.tokens, [AlignmentIndices(positions) for positions in padded.per_token(padded.positions)]
    tokens = TokenSpans.listed(rows, f"tokens {teacher}")
    if identical and keep is not None:
        positions = padded.positions[np.repeat(keep, padded.tokens.lengths)]
        return tokens, [AlignmentIndices(own) for own in cut(positions, tokens.offsets[rows.edges])]
    assert padded.counts is not None
    parts = [part.csr[teacher] for part in rows.parts]
    entries = TokenSpans.of(rows, [part.texts for part in parts])
    picked, counts = entries.pick([part.entries for part in parts]), padded.counts[:, teacher]
    src = picked[:, 0] + np.repeat(padded.starts(tokens.offsets), entries.lengths)
    weight = picked.view(np.float32)[:, 1].copy()
    covered, upto = np.flatnonzero(counts), np.cumsum(counts)
    of_entries = entries.offsets[rows.edges]
    of_tokens = np.searchsorted(covered, padded.tokens.offsets[rows.edges])
    first = (upto - counts)[covered] - np.repeat(of_entries[:-1], np.diff(of_tokens))
    columns = (
        cut(padded.positions[covered], of_tokens),
        cut(src, of_entries),
        cut(first, of_tokens),
        cut(weight, of_entries),
    )
    return tokens, [AlignmentIndices(*own) for own in zip(*columns, strict=True)]


def text_indices(tokens: TokenSelection, padded: PaddedBatches) -> list[AlignmentIndices]:
    """For targets per text, which need no alignment: the student's first tokens, or all of a row as a bag."""
    if padded.rows.with_hidden is not None:
        return _indices_of_some(tokens, padded, padded.rows.with_hidden)
    if tokens == "pooled":
        bags = padded.per_row(padded.starts(padded.tokens.offsets))
        positions = padded.per_token(padded.positions)
        return [AlignmentIndices(own, bags=bag) for own, bag in zip(positions, bags, strict=True)]
    return [AlignmentIndices(positions) for positions in padded.per_row(padded.first_tokens)]


def _indices_of_some(tokens: TokenSelection, padded: PaddedBatches, keep: np.ndarray) -> list[AlignmentIndices]:
    """``text_indices`` for the rows where ``keep`` [rows] is true; the others have no target."""
    rows = padded.rows
    edges = np.concatenate([[0], np.cumsum(keep)])[rows.edges]
    if tokens != "pooled":
        return [AlignmentIndices(positions) for positions in cut(padded.first_tokens[keep], edges)]
    lengths = padded.tokens.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths[keep])])
    of_tokens = offsets[edges]
    positions = cut(padded.positions[np.repeat(keep, lengths)], of_tokens)
    bags = cut(offsets[:-1] - np.repeat(of_tokens[:-1], np.diff(edges)), edges)
    places = np.arange(len(rows)) - np.repeat(rows.edges[:-1], rows.counts)
    columns = zip(positions, bags, cut(places[keep], edges), strict=True)
    return [AlignmentIndices(own, bags=bag, bag_rows=row) for own, bag, row in columns]


def cached_targets(
    padded: PaddedBatches, teachers: tuple[str, ...], layer_map: LayerMap, formats: StoredFormats
) -> Iterator[Targets]:
    """The targets of every step out of decoded parts; values stay in the dtype in which they were stored."""
    rows, records = padded.rows, padded.rows.text_records
    if "logits" in (records.dtype.names or ()):
        logits = records["logits"]
    else:
        logits = np.empty((len(records), len(teachers), 0), np.float32)
    logits_of_steps = cut(np.ascontiguousarray(logits.swapaxes(0, 1)), rows.edges, axis=1)
    groups = [
        _layer_group(padded, index, name, tokens, formats)
        for index, name in enumerate(teachers)
        for tokens in rows.parts[0].teachers[index].hidden
    ]
    wanted = {
        (index, student_layer): (name, layer)
        for index, name in enumerate(teachers)
        for student_layer, layer in enumerate(layer_map.get(name, ()), start=1)
        if layer is not None
    }
    for step, (first, last) in enumerate(itertools.pairwise(rows.edges.tolist())):
        hidden: dict[tuple[str, int], Hidden] = {}
        for group in groups:
            hidden |= group(step, first, last)
        yield Targets(teachers, logits_of_steps[step], {key: hidden[stored] for key, stored in wanted.items()})


def _layer_group(
    padded: PaddedBatches, index: int, teacher: str, selected: TokenSelection, formats: StoredFormats
) -> Callable[[int, int, int], dict[tuple[str, int], Hidden]]:
    """(step, first row, last row + 1) -> targets of the layers that a teacher stores for the ``selected`` tokens."""
    rows = padded.rows
    layers = [part.teachers[index].hidden[selected] for part in rows.parts]
    if selected == "all":
        tokens, indices = token_indices(padded, index)
    else:  # a text has one vector, or none
        ends = rows.texts + (1 if rows.with_hidden is None else rows.with_hidden)
        tokens, indices = TokenSpans(rows, rows.texts, ends), text_indices(selected, padded)
    counts = np.diff(tokens.offsets[rows.edges]).tolist()
    dtype, parts = layers[0].dtype, [part.bytes for part in layers]
    spans = tokens.spans(dtype.itemsize)

    def targets(step: int, first: int, last: int) -> dict[tuple[str, int], Hidden]:
        gathered = gather_spans(parts, spans[first:last], counts[step], dtype.itemsize)
        return {
            (teacher, layer): indices[step].target(values, scales, formats[teacher, layer].decoder)
            for layer, (values, scales) in layers_of(gathered, dtype).items()
        }

    return targets
