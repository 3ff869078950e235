"""What the allocator keeps of large blocks that were freed: nothing, where the C library can be told so.

Joining and ordering a million examples takes arrays of some megabytes for a moment, and an upload holds parts of that size, from
many threads. glibc raises the size from which a block is a mapping of its own as soon as one was freed, and then keeps such
blocks in the arena of each thread: the memory of a process would grow with the number of rows that it looked at, or of files
that it sent, not with what it holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_FROM = 1 << 20


def give_back_large_blocks() -> bool:
    """Let blocks of a MiB and more go back to the system as soon as they are freed, in this process. False where it cannot be said."""
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _FROM))
    return False


def give_back_freed() -> None:
    """Give all that was freed until now back to the system: a millisecond, after work whose arrays will not be needed again."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
