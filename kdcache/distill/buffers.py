"""Memory for the values of batches, used again once no batch looks at it any more.

Memory fresh from the system costs a page fault for every 4 KiB, which takes longer than copying so much; a step with many
layers may have thousands of them. Whether somebody still looks at a block is what its reference count says: every view, slice
and tensor of it holds the block itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

_KEPT_BYTES = 256 << 20  # beyond that, blocks are left to whoever holds them
_ALIGN = 64


def _references(blocks: Sequence[np.ndarray], place: int) -> int:
    return sys.getrefcount(blocks[place])


_ALONE = _references([np.empty(0)], 0)  # of a block that only its list holds; how many that are depends on the interpreter


class Buffers:
    """Blocks of memory, oldest first. For one thread; what is handed out may be used and dropped in any."""

    def __init__(self, limit: int = _KEPT_BYTES) -> None:
        self._limit = limit
        self._blocks: list[np.ndarray] = []

    def arrays(self, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Uninitialised arrays uint8 of these shapes, in one block."""
        sizes = [-(-count * width // _ALIGN) * _ALIGN for count, width in shapes]
        block, found, start = self._block(sum(sizes)), [], 0
        for size, (count, width) in zip(sizes, shapes, strict=True):
            found.append(block[start : start + count * width].reshape(count, width))
            start += size
        return found

    def _block(self, size: int) -> np.ndarray:
        for place in range(len(self._blocks)):
            if len(self._blocks[place]) >= size and _references(self._blocks, place) == _ALONE:
                self._blocks.append(self._blocks.pop(place))
                return self._blocks[-1]
        block = np.empty(size + size // 4, np.uint8)  # room for a batch that is a little longer
        places = range(len(self._blocks))
        kept = [self._blocks[at] for at in places if len(self._blocks[at]) >= size or _references(self._blocks, at) > _ALONE]
        self._blocks = kept  # without blocks that are free and too short
        if sum(map(len, kept)) + len(block) <= self._limit:
            kept.append(block)
        return block
