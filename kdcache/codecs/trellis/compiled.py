"""The search of ``viterbi`` as one compiled loop: the same rows in a third of the time. Needs numba.

Costs of some tokens stay in the processor's first cache from one coordinate to the next, where the operations of torch
and numpy each go through all of them. Multiplication and addition may be contracted (FMA), as torch's kernels are
compiled, so that costs have the same rounding, and rows the same bytes, with and without numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from kdcache.codecs.trellis.viterbi import FEW, NEVER, OFTEN

if TYPE_CHECKING:
    from torch import Tensor

_LANES = 128  # tokens at once
_NEVER, _TWICE = np.float32(NEVER), np.float32(-2)
_MOST = 256  # entries of a coordinate of eight bits

_compiled = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})


class CompiledSearch:
    """``levels``: the table [2 ** max(window, bits)] of each coordinate, which has ``bits``."""

    def __init__(self, levels: Sequence[Tensor], bits: Sequence[int], window: int) -> None:
        tables = [np.ascontiguousarray(table.numpy(), np.float32) for table in levels]
        self._bits = np.array(bits, np.int64)
        self._shared = np.int64(1) << (np.maximum(self._bits, window) - self._bits)
        self._left = np.append(self._shared[1:], 1)
        self._tables = np.concatenate([*tables, np.zeros(0, np.float32)])
        self._squares = self._tables * self._tables
        self._starts = np.cumsum([0, *map(len, tables)])[:-1]

    def windows_of(self, coordinates: np.ndarray) -> np.ndarray:
        """Entries uint8 [dim, n] of the rows with the least squared error from ``coordinates`` float32 [n, dim]."""
        entries = np.empty((len(self._bits), len(coordinates)), np.uint8)
        if len(self._bits):
            plan = (self._bits, self._shared, self._left, self._tables, self._squares, self._starts, _RANKS)
            _search(np.ascontiguousarray(coordinates, np.float32), *plan, entries)
        return entries


def _reversed(count: int) -> list[int]:
    """The numbers of ``count`` bits by their bits read backwards: of equal costs the first one is taken."""
    return [int(f"{number:0{count}b}"[::-1], 2) if count else 0 for number in range(1 << count)]


_RANKS = np.array([rank for count in range(9) for rank in _reversed(count)], np.int32)


@_compiled
def _search(
    coordinates: Any, bits: Any, shared: Any, left: Any, tables: Any, squares: Any, starts: Any, ranks: Any, out: Any
) -> None:
    """Fill ``out`` [dim, n]: entries of the best rows. Blocks of tokens, coordinate by coordinate, then backwards."""
    tokens, dims = coordinates.shape
    best, fresh = np.empty((_MOST, _LANES), np.float32), np.empty((_MOST, _LANES), np.float32)
    choices = np.empty((left.sum(), _LANES), np.uint8)
    column, least = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    code = np.empty(_LANES, np.int32)
    for first in range(0, tokens, _LANES):
        count = min(_LANES, tokens - first)
        best[: shared[0]] = _NEVER
        best[0] = np.float32(0)  # the bits before a row are zeros
        column[:] = np.float32(0)
        row = 0
        for place in range(dims):
            for lane in range(count):
                column[lane] = coordinates[first + lane, place]
            start, end = starts[place], starts[place] + (shared[place] << bits[place])
            table, square, windows = tables[start:end], squares[start:end], left[place]
            _step(best, fresh, column, table, square, bits[place], windows, ranks, least, code, choices[row:])
            best, fresh = fresh, best
            row += windows
            if windows <= FEW or place % OFTEN == 0:
                _subtract_least(best, windows, least)
        _go_back(choices, row, bits, left, code, out[:, first : first + count])


@_compiled
def _step(
    best: Any, fresh: Any, column: Any, table: Any, square: Any, depth: Any, windows: Any, ranks: Any, least: Any,
    code: Any, choices: Any
) -> None:  # fmt: skip
    """Costs of the next ``windows``, and which dropped bits gave each: the cheapest of the entries that end in it.

    An entry of cost ``best[entry >> depth] + table ** 2 - 2 * table * column`` is ``dropped * windows + window``.
    """
    count = len(table) // windows
    ranked = ranks[count - 1 : 2 * count - 1]
    nothing = np.int32(0)
    for window in range(windows):
        second = np.int32(ranked[1])
        entry = second * windows + window
        before, other = best[window >> depth], best[entry >> depth]
        q0, m0, q1, m1 = square[window], _TWICE * table[window], square[entry], _TWICE * table[entry]
        for lane in range(_LANES):
            first_cost = before[lane] + q0 + m0 * column[lane]
            cost = other[lane] + q1 + m1 * column[lane]
            better = cost < first_cost
            least[lane] = cost if better else first_cost
            code[lane] = second if better else nothing
        for rank in range(2, count):
            dropped = np.int32(ranked[rank])
            entry = dropped * windows + window
            other = best[entry >> depth]
            q1, m1 = square[entry], _TWICE * table[entry]
            for lane in range(_LANES):
                cost = other[lane] + q1 + m1 * column[lane]
                better = cost < least[lane]
                least[lane] = cost if better else least[lane]
                code[lane] = dropped if better else code[lane]
        for lane in range(_LANES):
            fresh[window, lane] = least[lane]
            choices[window, lane] = code[lane]


@_compiled
def _subtract_least(best: Any, windows: Any, least: Any) -> None:
    """Small sums keep the resolution of float32."""
    least[:] = best[0]
    for window in range(1, windows):
        for lane in range(_LANES):
            least[lane] = min(least[lane], best[window, lane])
    for window in range(windows):
        for lane in range(_LANES):
            best[window, lane] -= least[lane]


@_compiled
def _go_back(choices: Any, row: Any, bits: Any, left: Any, window: Any, out: Any) -> None:
    """Entries of the rows that end in the window with the least cost: the only one that is left."""
    window[:] = 0
    for place in range(len(bits) - 1, -1, -1):
        row -= left[place]
        for token in range(out.shape[1]):
            entry = choices[row + window[token], token] * left[place] + window[token]
            out[place, token] = entry
            window[token] = entry >> bits[place]
