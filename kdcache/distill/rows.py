"""Where the rows of a run of steps lie: in which parts, where in their packed arrays, and where in the padded tables of their steps.

All of it is index arithmetic in numpy, done once for a run of steps, because it costs nearly the same for one step as for thirty.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.distill.alignment import ranges

if TYPE_CHECKING:
    from kdcache.distill.parts import DecodedPart


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of consecutive steps: row r is text ``rows[r]`` of ``parts[part_of[r]]``, step s has rows ``edges[s]`` to ``edges[s + 1]``."""

    parts: Sequence[DecodedPart]
    part_of: np.ndarray
    rows: np.ndarray
    edges: np.ndarray  # int64[steps + 1]

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Rows of each step."""
        return np.diff(self.edges)

    def longest_first(self, lengths: np.ndarray) -> np.ndarray:
        """The rows of every step by falling length, so that micro-batches are of like length and hold little padding."""
        return np.lexsort((-lengths, np.repeat(np.arange(len(self.counts)), self.counts)))  # stable

    def take(self, order: np.ndarray) -> Rows:
        """The same steps with rows in another order."""
        return Rows(self.parts, self.part_of[order], self.rows[order], self.edges)

    def per_text(self, arrays: Sequence[np.ndarray], beyond: int = 0) -> np.ndarray:
        """Entry ``rows[r] + beyond`` of an array per part, for every row r."""
        by_part, borders = self.by_part
        texts = self.rows[by_part] + beyond
        taken = [array.take(texts[first:last], axis=0) for array, (first, last) in zip(arrays, borders, strict=True)]
        found = np.empty((len(self), *arrays[0].shape[1:]), arrays[0].dtype)
        found[by_part] = np.concatenate(taken)
        return found

    @functools.cached_property
    def by_part(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The rows part by part, and from where to where those of each part are."""
        upto = np.cumsum(np.bincount(self.part_of, minlength=len(self.parts)))
        return np.argsort(self.part_of, kind="stable"), list(itertools.pairwise([0, *upto.tolist()]))


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Places by falling length; equal ones keep their order."""
    return np.argsort(-lengths, kind="stable")


class Ragged:
    """Where the tokens of ``rows`` lie in the packed arrays of their parts: from ``starts`` to ``ends``."""

    def __init__(self, rows: Rows, starts: np.ndarray, ends: np.ndarray) -> None:
        self.rows, self._starts, self._ends = rows, starts, ends
        self.lengths = ends - starts

    @classmethod
    def of(cls, rows: Rows, offsets: Sequence[np.ndarray]) -> Ragged:
        """By one offsets array [texts + 1] per part."""
        return cls(rows, rows.per_text(offsets), rows.per_text(offsets, 1))

    def take(self, order: np.ndarray) -> Ragged:
        """The same steps with rows in another order."""
        return Ragged(self.rows.take(order), self._starts[order], self._ends[order])

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64[rows + 1]: where the rows begin when they are packed one after the other."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @functools.cached_property
    def _spans(self) -> list[tuple[int, int, int]]:
        return list(zip(self.rows.part_of.tolist(), self._starts.tolist(), self._ends.tolist(), strict=True))

    def gather(self, arrays: Sequence[np.ndarray], first: int, last: int) -> np.ndarray:
        """The packed values of the rows from ``first`` to ``last``, in row order, from one packed array per part; row by row."""
        return np.concatenate([arrays[part][start:end] for part, start, end in self._spans[first:last]])

    def pick(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The same for all rows at once and token by token, which is cheaper where a token has a few bytes only."""
        by_part, borders = self.rows.by_part
        lengths = self.lengths[by_part]
        upto, places = np.concatenate([[0], np.cumsum(lengths)]), ranges(self._starts[by_part], lengths)
        taken = [
            array.take(places[upto[first] : upto[last]], axis=0) for array, (first, last) in zip(arrays, borders, strict=True)
        ]
        found = np.empty((len(places), *arrays[0].shape[1:]), arrays[0].dtype)
        found[ranges(self.offsets[:-1][by_part], lengths)] = np.concatenate(taken)
        return found


class Sheets:
    """The student's tokens as padded tables [B, L], one for each step, which lie one after the other in flat arrays."""

    def __init__(self, tokens: Ragged) -> None:
        rows = tokens.rows
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


def cut(array: np.ndarray, borders: np.ndarray) -> list[torch.Tensor]:
    """The pieces of an array between ``borders``, as tensors that share its memory."""
    return [torch.from_numpy(array[first:last]) for first, last in itertools.pairwise(borders.tolist())]
