"""Batches from decoded parts: ragged rows gathered with numpy, without a loop over rows or tokens.

Whether the rows come from the parts of a cache or from teachers that ran a moment ago, spans become indices here and
nowhere else. numpy gathers, because torch's fancy indexing of float16 on the CPU is an order of magnitude slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.distill.alignment import ranges
from kdcache.distill.targets import Hidden, Targets

if TYPE_CHECKING:
    from kdcache.distill.parts import DecodedPart


@dataclass(frozen=True, eq=False)
class Rows:
    """B rows of a batch: row b is text ``rows[b]`` of ``parts[part_of[b]]``."""

    parts: Sequence[DecodedPart]
    part_of: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def longest_first(self) -> np.ndarray:
        """The order of the rows by their student tokens, so that micro-batches are of like length and hold little padding."""
        lengths = np.empty(len(self), np.int64)
        for index, part in enumerate(self.parts):
            mine = self.part_of == index
            lengths[mine] = part.student.lengths[self.rows[mine]]
        return longest_first(lengths)

    def take(self, order: np.ndarray) -> Rows:
        return Rows(self.parts, self.part_of[order], self.rows[order])


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Places by falling length; equal ones keep their order."""
    return np.argsort(-lengths, kind="stable")


class Ragged:
    """Where the tokens of a batch's rows lie in the packed arrays of its parts, one offsets array per part."""

    def __init__(self, rows: Rows, offsets: Sequence[np.ndarray]) -> None:
        starts, self.lengths = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        members = [np.flatnonzero(rows.part_of == part) for part in range(len(offsets))]
        for bounds, mine in zip(offsets, members, strict=True):
            text = rows.rows[mine]
            starts[mine] = bounds[text]
            self.lengths[mine] = bounds[text + 1] - starts[mine]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        by_part = np.concatenate(members)
        self._there = np.split(
            ranges(starts[by_part], self.lengths[by_part]), np.cumsum([self.lengths[mine].sum() for mine in members])[:-1]
        )
        self._order = None  # of the tokens as they come part by part, in row order
        if len(members) > 1:
            came = np.concatenate([[0], np.cumsum(self.lengths[by_part])])
            first = np.empty(len(rows), np.int64)
            first[by_part] = came[:-1]
            self._order = ranges(first, self.lengths)

    def gather(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The packed values of the rows, in row order, from one packed array per part."""
        if self._order is None:
            return arrays[0].take(self._there[0], axis=0)
        grouped = np.empty((len(self._order), *arrays[0].shape[1:]), arrays[0].dtype)
        begin = 0
        for array, there in zip(arrays, self._there, strict=True):
            array.take(there, axis=0, out=grouped[begin : begin + len(there)], mode="clip")  # 'raise' would copy twice
            begin += len(there)
        return grouped.take(self._order, axis=0)


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


def cached_targets(
    rows: Rows, teachers: tuple[str, ...], layer_map: Mapping[str, tuple[int, ...]], student_tokens: Ragged
) -> Targets:
    """Targets of a batch out of decoded parts; values stay in the dtype in which they were stored."""
    hidden: dict[tuple[int, int], Hidden] = {}
    for index, name in enumerate(teachers):
        mine = [part.teachers[index] for part in rows.parts]
        offsets = [part.offsets for part in mine if part.offsets is not None]
        if not layer_map.get(name) or len(offsets) != len(mine):
            continue
        tokens = Ragged(rows, offsets)
        pieces = alignment_pieces(rows, index, student_tokens, tokens)
        read: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for student_layer, layer in enumerate(layer_map[name], start=1):
            if layer not in read:
                scales = [part.hidden[layer].scales for part in mine]
                given = [array for array in scales if array is not None]
                values = torch.from_numpy(tokens.gather([part.hidden[layer].values for part in mine]))
                read[layer] = values, torch.from_numpy(tokens.gather(given)) if given else None
            hidden[index, student_layer] = Hidden(*read[layer], pieces.src, pieces.dst, pieces.weight, pieces.positions)
    return Targets(teachers, _logits(rows, len(teachers)), hidden)


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
