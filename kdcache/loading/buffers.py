"""Memory of decoded parts, used again by the parts that come after them.

A part takes tens of megabytes. Fresh memory of that size comes page by page from the system, which has to clear each
page; on a virtual machine that can take longer than reading the part. So a buffer that no array refers to any more goes
to the next part.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import numpy as np

_SLACK = 16  # a buffer is a sixteenth larger than asked for: parts differ a little
_LARGEST_WASTE = 4  # at most a quarter of a buffer is left unused


class Buffers:
    """Gives buffers, and holds those that are free. Thread-safe.

    Together, buffers in use and free ones never take more than those in use took at one time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._returned: deque[np.ndarray] = deque()  # by whichever thread dropped the last array, without a lock
        self._free: list[np.ndarray] = []
        self._used = self._most = 0  # bytes in use, now and at most so far

    def empty(self, size: int) -> np.ndarray:
        """Uninitialised uint8 [size]. The buffer is free again once no array, view or tensor refers to it."""
        with self._lock:
            self._collect()
            fitting = [one for one in self._free if size <= len(one) <= size + size // _LARGEST_WASTE]
            if fitting:
                owner = min(fitting, key=len)
                self._free = [one for one in self._free if one is not owner]
            else:
                owner = np.empty(size + size // _SLACK, np.uint8)
            self._used += len(owner)
            self._most = max(self._most, self._used)
            self._shrink()
        lent = np.frombuffer(owner.data, np.uint8, size)
        # a memoryview of numpy's own, to which all arrays, views and tensors of ``lent`` refer
        weakref.finalize(lent.base, self._returned.append, owner).atexit = False
        return lent

    def clear(self) -> None:
        """Free the memory of all buffers that are not in use."""
        with self._lock:
            self._collect()
            self._free.clear()
            self._most = self._used

    def _collect(self) -> None:
        while self._returned:
            owner = self._returned.popleft()
            self._used -= len(owner)
            self._free.append(owner)

    def _shrink(self) -> None:
        while self._free and self._used + sum(map(len, self._free)) > self._most:
            del self._free[0]  # the one that was returned first
