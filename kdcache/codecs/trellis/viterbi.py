"""Finds the best row of a trellis code on the CPU: the result of ``coder.search_on_device`` with less memory traffic.

The entry of a coordinate is a window over the bits of the row. The next coordinate drops the oldest bits of the window.
Each dropped bit is a choice between two halves of the costs: a comparison and a minimum. So only the costs of one
coordinate are in memory. For the backward pass one byte per remaining window is kept: the dropped bits. With numba
``compiled`` does the same in one loop. docs/decisions/0014 has measurements.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from kdcache.codecs.trellis.compiled import CompiledSearch

_TOKENS = 4096  # of a block: in smaller blocks, Python's time per step outweighs the better use of the CPU cache
NEVER = 1e30
# the minimum is subtracted from the costs when few are left, and at every 16th coordinate: small sums are exact
FEW, OFTEN = 4, 16


@dataclass(frozen=True, eq=False)
class _Step:
    """One coordinate: it continues ``shared`` windows, has ``entries``, and leaves ``left`` windows to the next one."""

    shared: int
    entries: int
    left: int
    depth: int
    table: Tensor  # float32 [entries, 1]
    squares: Tensor  # float32 [shared, 2 ** depth, 1]


class Viterbi:
    """``levels``: the table [2 ** max(window, bits)] of each coordinate, which has ``bits``."""

    def __init__(self, levels: Sequence[Tensor], bits: Sequence[int], window: int) -> None:
        shared = [1 << (max(window, depth) - depth) for depth in bits]
        self._steps = [
            _Step(before, len(table), left, depth, table[:, None], (table * table).view(before, -1, 1))
            for before, left, depth, table in zip(shared, [*shared[1:], 1], bits, levels, strict=True)
        ]
        self._widest = max((step.entries for step in self._steps), default=0)
        self._compiled = _compiled(levels, bits, window)

    def windows_of(self, coordinates: Tensor) -> np.ndarray:
        """Entries uint8 [dim, n] of the rows with the least squared error from ``coordinates`` float32 [n, dim]."""
        if self._compiled is not None:
            return self._compiled.windows_of(coordinates.numpy())
        entries = np.empty((len(self._steps), len(coordinates)), np.uint8)
        blocks = -(-len(coordinates) // _TOKENS)
        borders = [len(coordinates) * number // max(1, blocks) for number in range(blocks + 1)]
        for first, last in itertools.pairwise(borders):
            block = _Block(last - first, self._widest, sum(step.left for step in self._steps))
            self._forward(coordinates[first:last].T.contiguous(), block)
            self._backward(block, entries[:, first:last])
        return entries

    def _forward(self, columns: Tensor, block: _Block) -> None:
        """Fill ``block.choices``.

        The cost of a window and a token is the least error of all rows up to the coordinate whose entry ends with this
        window, up to a constant per token.
        """
        best, row = block.best, 0
        best[: self._steps[0].shared] = NEVER
        best[0] = 0.0  # the bits before a row are zeros
        for place, (step, column) in enumerate(zip(self._steps, columns, strict=True)):
            before, by_window, costs = block.views(step.shared, step.entries)
            torch.add(before, step.squares, out=by_window)
            costs.addcmul_(step.table, column, value=-2.0)
            block.drop(step.entries, step.left, block.choices[row : row + step.left])
            row += step.left
            if step.left <= FEW or place % OFTEN == 0:
                best[: step.left] -= best[: step.left].min(axis=0)

    def _backward(self, block: _Block, entries: np.ndarray) -> None:
        """Write ``entries`` [dim, n] of the rows with the least cost."""
        count, row = entries.shape[1], len(block.choices)
        tokens, window = np.arange(count), np.zeros(count, np.uint8)
        where, choices = tokens.copy(), block.choices.reshape(-1)
        for step, entry in zip(reversed(self._steps), entries[::-1], strict=True):
            row -= step.left
            dropped = choices[row * count : (row + step.left) * count].take(where)
            np.multiply(dropped, np.uint8(step.left), out=entry)
            entry += window
            np.right_shift(entry, step.depth, out=window)
            np.multiply(window, count, out=where, dtype=np.int64)
            where += tokens


def _compiled(levels: Sequence[Tensor], bits: Sequence[int], window: int) -> CompiledSearch | None:
    """The compiled search; None where numba is not installed."""
    try:
        from kdcache.codecs.trellis.compiled import CompiledSearch
    except ImportError:
        return None
    return CompiledSearch(levels, bits, window)


class _Memory:
    """The memory of a block: ``entries`` costs and ``choices`` choices."""

    def __init__(self, entries: int, choices: int) -> None:
        self.costs, self.best = torch.empty(entries), torch.empty(entries // 2)
        self.codes = np.empty((3, entries // 2), np.uint8)
        self.choices = np.empty(choices, np.uint8)


_kept = threading.local()  # memory of this thread: new memory would take a tenth of the time of a search


class _Block:
    """Costs and choices of a block of ``count`` tokens."""

    def __init__(self, count: int, widest: int, choices: int) -> None:
        entries, choice_bytes = widest * count, choices * count
        memory: _Memory | None = getattr(_kept, "memory", None)
        if memory is None or len(memory.costs) < entries or len(memory.choices) < choice_bytes:
            memory = _kept.memory = _Memory(entries, choice_bytes)
        self._costs = memory.costs[:entries].view(widest, count)
        self._best = memory.best[: entries // 2].view(-1, count)
        self._values, self.best = self._costs.numpy(), self._best.numpy()
        self._codes = [memory.codes[number, : entries // 2].reshape(-1, count) for number in range(3)]
        self.choices = memory.choices[:choice_bytes].reshape(choices, count)
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def views(self, shared: int, entries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Costs of the previous windows [shared, 1, n]; of the next [shared, entries / shared, n] and [entries, n]."""
        if (shared, entries) not in self._views:
            costs = self._costs[:entries]
            self._views[shared, entries] = self._best[:shared, None], costs.unflatten(0, (shared, -1)), costs
        return self._views[shared, entries]

    def drop(self, entries: int, left: int, choices: np.ndarray) -> None:
        """Reduce the costs of ``entries`` to those of the windows ``left``; write the dropped bits, oldest first.

        They go to ``choices`` [left, n].
        """
        flags, code, spare = self._codes
        half = entries // 2
        code = choices if half == left else code[:half]
        self._compare(half, code, last=half == left)
        while half > left:
            half //= 2
            flag, target = flags[:half], choices if half == left else spare[:half]
            self._compare(half, flag, last=half == left)
            low, high = code[:half], code[half : 2 * half]
            np.bitwise_xor(low, high, out=target)  # target = 2 * (high where flag else low) + flag
            target *= flag
            target ^= low
            target += target
            target |= flag
            code, spare = target, code

    def _compare(self, half: int, flag: np.ndarray, *, last: bool) -> None:
        low, high = self._values[:half], self._values[half : 2 * half]
        np.less(high, low, out=flag.view(np.bool_))
        np.minimum(low, high, out=self.best[:half] if last else low)
