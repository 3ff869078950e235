"""The best row of a trellis code on the CPU: what ``coder.search_on_device`` finds, with a quarter of its memory traffic.

The entry of a coordinate is a window over the bits of the row. Going on to the next coordinate drops the oldest bits of the window, and
each dropped bit is a choice between two halves of the costs: a comparison, which is all that has to be kept, and a minimum.
So the costs of two coordinates are enough, nothing is searched on the way back, and the choices that are met there are the
bits of the row. docs/decisions/0014 has the numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

_CHOICES_BYTES = (
    64 << 20
)  # of a block of tokens: few long operations cost less than many short ones, also where costs leave the caches
_MOST_TOKENS = 4096
_NEVER = 1e30
_FEW, _OFTEN = (
    4,
    16,
)  # costs are taken relative to the least where few are left, and every so many coordinates: small sums are exact


@dataclass(frozen=True, eq=False)
class _Step:
    """One coordinate. ``halves``: how many windows are left after each bit that is dropped on the way to the next one."""

    depth: int
    table: Tensor  # float32 [entries, 1]
    squares: Tensor  # float32 [windows of before that it continues, 2 ** depth, 1]
    halves: tuple[int, ...]


class Trellis:
    """``levels``: for each coordinate, of ``bits`` each, its table [2 ** max(window, bits)]."""

    def __init__(self, levels: Sequence[Tensor], bits: Sequence[int], window: int) -> None:
        self.bits = list(bits)
        self.widths = [max(window, depth) for depth in bits]
        kept = [width - depth for width, depth in zip(self.widths, bits, strict=True)]  # bits of a window that lie before its own
        self._steps = [
            _Step(
                depth,
                table[:, None],
                (table * table).view(1 << before, -1, 1),
                tuple(1 << k for k in range(width - 1, after - 1, -1)),
            )
            for depth, table, width, before, after in zip(bits, levels, self.widths, kept, [*kept[1:], 0], strict=True)
        ]
        self._choices = sum(sum(step.halves) for step in self._steps)  # bytes per token
        self._block = min(_MOST_TOKENS, _power_of_two(_CHOICES_BYTES // (2 * self._choices) + 1))

    def bits_of(self, coordinates: Tensor) -> np.ndarray:
        """uint8 [sum of bits, n], 0 or 1: of all rows those whose values come closest to ``coordinates`` float32 [n, dim]."""
        found = np.empty((sum(self.bits), len(coordinates)), np.uint8)
        space = _space(min(self._block, _power_of_two(len(coordinates))), 1 << max(self.widths), self._choices)
        for first in range(0, len(coordinates), self._block):
            columns = coordinates[first : first + self._block].T.contiguous()
            self._forward(columns, space)
            self._backward(space, found[:, first : first + self._block])
        return found

    def windows_of(self, coordinates: Tensor) -> np.ndarray:
        """int64 [n, dim]: the entry of each coordinate in these rows."""
        found, most = self.bits_of(coordinates), max(self.widths)
        padded = np.concatenate([np.zeros((most, found.shape[1]), np.uint8), found])
        windows = np.empty((len(coordinates), len(self.bits)), np.int64)
        for place, (end, width) in enumerate(zip(np.cumsum(self.bits).tolist(), self.widths, strict=True)):
            windows[:, place] = (1 << np.arange(width)[::-1]) @ padded[most + end - width : most + end].astype(np.int64)
        return windows

    def _forward(self, columns: Tensor, space: _Space) -> None:
        """Fills the choices: for every bit that is dropped, and every window that is left, which of the two came cheaper.

        A cost, of an entry and a token, is the least error of a row up to the coordinate that takes that entry, up to a
        constant per token.
        """
        count, row = columns.shape[1], 0
        before, cost = space.costs[:, :, :count]
        before[: len(self._steps[0].squares)] = _NEVER
        before[0] = 0.0  # nothing but zeros lies before a row
        for place, (step, column) in enumerate(zip(self._steps, columns, strict=True)):
            shared, own, _ = step.squares.shape
            now = cost[: shared * own]
            torch.add(before[:shared, None], step.squares, out=now.unflatten(0, (shared, own)))
            now.addcmul_(step.table, column, value=-2.0)
            values = now.numpy()
            for half in step.halves:
                low, high = values[:half], values[half : 2 * half]
                np.less(high, low, out=space.choices[row : row + half, :count])
                np.minimum(low, high, out=low)
                row += half
            left = values[: step.halves[-1]]
            if len(left) <= _FEW or place % _OFTEN == 0:
                left -= left.min(axis=0)
            before, cost = cost, before

    def _backward(self, space: _Space, found: np.ndarray) -> None:
        """The bits ``found`` [bits, n] of the rows that end cheapest; ``where`` is window * size + token throughout."""
        tokens, flat = np.arange(found.shape[1]), space.choices.view(np.uint8).reshape(-1)
        shift, where, rise = space.size.bit_length() - 1, tokens.copy(), np.empty_like(tokens)
        row, end = len(space.choices), len(found)
        for step in reversed(self._steps):
            for half in reversed(step.halves):
                row -= half
                chosen = flat[row << shift : (row + half) << shift].take(where)
                place = end - half.bit_length()
                if place >= 0:  # else a zero before the row
                    found[place] = chosen
                where += np.multiply(chosen, np.int64(half << shift), out=rise, dtype=np.int64)
            where >>= shift + step.depth
            where <<= shift
            where += tokens
            end -= step.depth


def _power_of_two(number: int) -> int:
    """The least one that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True, eq=False)
class _Space:
    """Memory for a block of up to ``size`` tokens, a power of two: costs of two coordinates in turn, and the choices of all."""

    size: int
    costs: Tensor  # float32 [2, entries, size]
    choices: np.ndarray  # bool [choices, size]


_kept = threading.local()  # fresh memory costs a quarter of a search; it goes with the thread


def _space(size: int, widest: int, choices: int) -> _Space:
    """Of this thread: what was there before, where that is enough."""
    costs, chosen = getattr(_kept, "memory", (torch.empty(0), np.empty(0, np.bool_)))
    if len(costs) < 2 * widest * size or len(chosen) < choices * size:
        costs, chosen = torch.empty(2 * widest * size), np.empty(choices * size, np.bool_)
        _kept.memory = costs, chosen
    return _Space(size, costs[: 2 * widest * size].view(2, widest, size), chosen[: choices * size].reshape(choices, size))
