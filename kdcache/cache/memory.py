"""What the C library does with memory that was freed: give it back to the system, or keep it, where it can be told so.

Joining and ordering a million examples takes arrays of some megabytes for a moment, and an upload holds parts of that
size, from many threads. glibc raises the size from which a block is a mapping of its own as soon as one was freed, and
then keeps such blocks in the arena of each thread: the memory of a process would grow with the number of rows that it
looked at, or of files that it sent, not with what it holds. There freed memory goes back.

Training a student on the CPU is the opposite: every step frees and asks again for the same large blocks, and a page
that comes anew from the system costs more than what is computed with it. There freed memory stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_LARGE = 1 << 20
_NEVER = 1 << 30  # both take an int


def give_back_large_blocks() -> bool:
    """Let blocks of a MiB and more go back to the system as soon as they are freed, in this process.

    False where it cannot be said.
    """
    return _tell({_MMAP_THRESHOLD: _LARGE})


def keep_freed_blocks() -> bool:
    """Let freed blocks of up to a GiB stay with this process.

    False where it cannot be said, or where the environment says something.
    """
    said = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    return not said and _tell({_MMAP_THRESHOLD: _NEVER, _TRIM_THRESHOLD: _NEVER})


def _tell(settings: dict[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        library = ctypes.CDLL(None)
        return all(library.mallopt(key, value) for key, value in settings.items())
    return False


def give_back_freed() -> None:
    """Give all that was freed until now back to the system.

    A millisecond, after work whose arrays will not be needed again.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
