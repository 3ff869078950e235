"""Memory of transfers under way, bounded in bytes: who needs more than is left waits.

Bounding the number of transfers is not enough: eight small files are a few kilobytes, eight large ones are all their parts at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ByteBudget:
    """At most ``limit`` bytes at once; what needs more than that is let through alone. Safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken = 0
        self._turn = threading.Lock()  # held by whoever waits for room, so that small ones do not pass a large one for ever
        self._freed = threading.Condition()

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Take ``count`` bytes of the budget while the block runs; waits for them."""
        with self._turn, self._freed:
            while self._taken and self._taken + count > self.limit:
                self._freed.wait()
            self._taken += count
        try:
            yield
        finally:
            with self._freed:
                self._taken -= count
                self._freed.notify_all()
