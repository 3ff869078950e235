"""Batches from decoded parts: ragged rows gathered with numpy, without a loop over rows or tokens.

Whether the rows come from the parts of a cache or from teachers that ran a moment ago, spans become indices here and
nowhere else. numpy gathers, because torch's fancy indexing of float16 on the CPU is an order of magnitude slower.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.distill.alignment import ranges
from kdcache.distill.forms import Form, Forms
from kdcache.distill.targets import Hidden, Targets

if TYPE_CHECKING:
    from kdcache.cache.spec import TokenSelection
    from kdcache.distill.forms import Decoder
    from kdcache.distill.parts import DecodedPart


@dataclass(frozen=True, eq=False)
class Rows:
    """B rows of a batch: row b is text ``rows[b]`` of ``parts[part_of[b]]``."""

    parts: Sequence[DecodedPart]
    part_of: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def longest_first(self, within: np.ndarray) -> np.ndarray:
        """The rows by falling length in student tokens inside each group of ``within``, whose numbers ascend.

        So micro-batches are of like length and hold little padding.
        """
        lengths = np.empty(len(self), np.int64)
        for index, part in enumerate(self.parts):
            mine = self.part_of == index
            lengths[mine] = part.student.lengths[self.rows[mine]]
        return np.lexsort((-lengths, within))  # stable

    def take(self, order: np.ndarray) -> Rows:
        return Rows(self.parts, self.part_of[order], self.rows[order])


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Places by falling length; equal ones keep their order."""
    return np.argsort(-lengths, kind="stable")


_ROW_BYTES = 4096  # a row of so many bytes is copied faster whole than token by token


class Ragged:
    """Where the tokens of a batch's rows lie in the packed arrays of its parts, one offsets array per part."""

    def __init__(self, rows: Rows, offsets: Sequence[np.ndarray]) -> None:
        starts, self.lengths = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        self._members = [np.flatnonzero(rows.part_of == part) for part in range(len(offsets))]
        for bounds, mine in zip(offsets, self._members, strict=True):
            text = rows.rows[mine]
            starts[mine] = bounds[text]
            self.lengths[mine] = bounds[text + 1] - starts[mine]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self._part_of, self._starts = rows.part_of, starts

    def gather(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The packed values of the rows, in row order, from one packed array per part."""
        token_bytes = arrays[0].itemsize * math.prod(arrays[0].shape[1:])
        if token_bytes * int(self.offsets[-1]) >= _ROW_BYTES * len(self.lengths) > 0:
            return np.concatenate([arrays[part][first:last] for part, first, last in self._spans])
        there, order = self._tokens
        if order is None:
            return arrays[0].take(there[0], axis=0)
        grouped = np.empty((len(order), *arrays[0].shape[1:]), arrays[0].dtype)
        begin = 0
        for array, mine in zip(arrays, there, strict=True):
            array.take(mine, axis=0, out=grouped[begin : begin + len(mine)], mode="clip")  # 'raise' would copy twice
            begin += len(mine)
        return grouped.take(order, axis=0)

    @functools.cached_property
    def _spans(self) -> list[tuple[int, int, int]]:
        """Part, first and last token of every row."""
        ends = self._starts + self.lengths
        return list(zip(self._part_of.tolist(), self._starts.tolist(), ends.tolist(), strict=True))

    @functools.cached_property
    def _tokens(self) -> tuple[list[np.ndarray], np.ndarray | None]:
        """The tokens of each part; where there are several parts, the place of each token among those, in row order."""
        by_part = np.concatenate(self._members)
        borders = np.cumsum([self.lengths[mine].sum() for mine in self._members])[:-1]
        there = np.split(ranges(self._starts[by_part], self.lengths[by_part]), borders)
        if len(self._members) == 1:
            return there, None
        came = np.concatenate([[0], np.cumsum(self.lengths[by_part])])
        first = np.empty(len(self.lengths), np.int64)
        first[by_part] = came[:-1]
        return there, ranges(first, self.lengths)


def student_inputs(rows: Rows, tokens: Ragged, pad_token_id: int) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` and, where the student takes them, ``token_type_ids``: int64 [B, L], padded right."""
    places, shape = flat_places(tokens), (len(rows), int(tokens.lengths.max(initial=0)))

    def padded(values: np.ndarray | int, filler: int) -> torch.Tensor:
        table = np.full(shape, filler, np.int64)
        table.reshape(-1)[places] = values
        return torch.from_numpy(table)

    inputs = {"input_ids": padded(tokens.gather([part.student.input_ids for part in rows.parts]), pad_token_id)}
    inputs["attention_mask"] = padded(1, 0)
    types = [part.student.token_type_ids for part in rows.parts]
    given = [array for array in types if array is not None]
    if given and len(given) == len(types):
        inputs["token_type_ids"] = padded(tokens.gather(given), 0)
    return inputs


def flat_places(tokens: Ragged) -> np.ndarray:
    """Flat places b * L + t of every token, int64[tokens of the batch]."""
    longest = int(tokens.lengths.max(initial=0))
    return ranges(np.arange(len(tokens.lengths), dtype=np.int64) * longest, tokens.lengths)


@dataclass(frozen=True, eq=False)
class Pieces:
    """The alignment of a batch, as ``Hidden`` wants it, without the values."""

    src: torch.Tensor | None
    dst: torch.Tensor | None
    weight: torch.Tensor | None
    positions: torch.Tensor
    bags: torch.Tensor | None = None

    def to(self, device: torch.device) -> Pieces:
        return Pieces(*(None if one is None else one.to(device) for one in vars(self).values()))  # type: ignore[arg-type]

    def target(self, values: torch.Tensor, scales: torch.Tensor | None, decoder: Decoder | None) -> Hidden:
        """The targets that ``values`` of this alignment are."""
        return Hidden(values, scales, self.src, self.dst, self.weight, self.positions, decoder, self.bags)


def alignment_pieces(rows: Rows, teacher: int, student_tokens: Ragged, teacher_tokens: Ragged) -> Pieces:
    """Cut a teacher's alignment of whole parts down to the rows of a batch."""
    places = flat_places(student_tokens)
    alignments = [part.teachers[teacher].alignment for part in rows.parts]
    if all(alignment is not None and alignment.identical for alignment in alignments):
        return Pieces(None, None, None, torch.from_numpy(places))
    parts = [part.explicit[teacher] for part in rows.parts]
    counts = student_tokens.gather([part.past for part in parts]) - student_tokens.gather([part.first for part in parts])
    entries = Ragged(rows, [part.texts for part in parts])
    src = entries.gather([part.src for part in parts]) + np.repeat(teacher_tokens.offsets[:-1], entries.lengths)
    weight = entries.gather([part.weight for part in parts])
    covered = counts > 0
    dst = np.repeat(np.arange(int(covered.sum())), counts[covered])
    return Pieces(*(torch.from_numpy(array) for array in (src, dst, weight, places[covered])))


def text_pieces(tokens: TokenSelection, student_tokens: Ragged) -> Pieces:
    """The same for targets per text, which need no alignment: the student's first tokens, or all of them in a bag per row."""
    if tokens == "pooled":
        bags = torch.from_numpy(student_tokens.offsets[:-1])
        return Pieces(None, None, None, torch.from_numpy(flat_places(student_tokens)), bags)
    longest = int(student_tokens.lengths.max(initial=0))
    return Pieces(None, None, None, torch.arange(len(student_tokens.lengths)) * longest)


def cached_targets(
    rows: Rows, teachers: tuple[str, ...], layer_map: Mapping[str, tuple[int, ...]], forms: Forms, student_tokens: Ragged
) -> Targets:
    """Targets of a batch out of decoded parts; values stay in the dtype in which they were stored."""
    hidden: dict[tuple[int, int], Hidden] = {}
    for index, name in enumerate(teachers):
        layers = layer_map.get(name, ())
        gathered = _Gathered(rows, index, student_tokens)
        read = {layer: gathered.target(layer, forms.get((name, layer), Form())) for layer in sorted(set(layers))}
        hidden |= {(index, student_layer): read[layer] for student_layer, layer in enumerate(layers, start=1)}
    return Targets(teachers, _logits(rows, len(teachers)), hidden)


class _Gathered:
    """One teacher's targets for the rows of a batch; what layers share is made once."""

    def __init__(self, rows: Rows, teacher: int, student_tokens: Ragged) -> None:
        self._rows, self._teacher, self._student_tokens = rows, teacher, student_tokens
        self._parts = [part.teachers[teacher] for part in rows.parts]
        self._shared: dict[TokenSelection, tuple[Ragged, Pieces]] = {}

    def target(self, layer: int, form: Form) -> Hidden:
        if form.tokens not in self._shared:
            self._shared[form.tokens] = self._places(form)
        tokens, pieces = self._shared[form.tokens]
        blocks = [part.hidden[layer] for part in self._parts]
        values = torch.from_numpy(tokens.gather([block.values for block in blocks]))
        given = [block.scales for block in blocks if block.scales is not None]
        scales = torch.from_numpy(tokens.gather(given)) if given else None
        return pieces.target(values, scales, form.decoder)

    def _places(self, form: Form) -> tuple[Ragged, Pieces]:
        if form.per_text:  # a text has one row
            one_each = [np.arange(len(part.student) + 1) for part in self._rows.parts]
            return Ragged(self._rows, one_each), text_pieces(form.tokens, self._student_tokens)
        tokens = Ragged(self._rows, [part.offsets for part in self._parts if part.offsets is not None])
        return tokens, alignment_pieces(self._rows, self._teacher, self._student_tokens, tokens)


def _logits(rows: Rows, teachers: int) -> torch.Tensor:
    """[N, B, C] float32; C = 0 where none were read."""
    gathered: list[np.ndarray] = []
    for index in range(teachers):
        parts = [part.teachers[index].logits for part in rows.parts]
        given = [array for array in parts if array is not None]
        if len(given) != len(parts):
            return torch.empty(teachers, len(rows), 0)
        logits = np.empty((len(rows), given[0].shape[1]), np.float32)
        for part, array in enumerate(given):
            mine = rows.part_of == part
            logits[mine] = array[rows.rows[mine]]
        gathered.append(logits)
    return torch.from_numpy(np.stack(gathered))
