"""Settings of malloc (glibc): return freed memory to the system, or keep it in the process.

Joining and ordering a million examples needs arrays of some megabytes for a moment, and uploads hold parts of that size
in many threads. glibc raises its mmap threshold when such a block is freed and then keeps freed blocks in the arena of
each thread, so the memory of a process grows with the rows it has read or the files it has sent. There freed memory is
returned.

Training on the CPU is the opposite: every step frees and allocates the same large blocks, and page faults cost more
than the computation. There freed memory is kept.
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
    """Return freed blocks of 1 MiB and more to the system at once. False if mallopt is unavailable."""
    return _mallopt({_MMAP_THRESHOLD: _LARGE})


def keep_freed_blocks() -> bool:
    """Keep freed blocks of up to 1 GiB. False if mallopt is unavailable, or the environment configures malloc."""
    configured = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    return not configured and _mallopt({_MMAP_THRESHOLD: _NEVER, _TRIM_THRESHOLD: _NEVER})


def _mallopt(settings: dict[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        return all(library.mallopt(key, value) for key, value in settings.items())
    return False


def give_back_freed() -> None:
    """Return all freed memory to the system; takes about a millisecond."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
