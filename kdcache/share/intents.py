"""Intents and marks: who is pushing, who is collecting, as objects that are renewed while their owner lives.

Nothing is locked: a dead owner stops renewing, and after the time to live, on the store's own clock, it counts for
nothing. The owner itself may sleep through that time (a laptop's lid). So it measures, on a clock that goes on during
sleep, how long ago it began its last renewal, and takes itself for lapsed some time before anybody else may. ``epoch``
counts the lapses: what was found out in one epoch (which objects are there) has to be found out again in the next.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kdcache.cache.canonical import NotCanonicalError, canonical_json, parse_json
from kdcache.errors import KdcacheError, LockedError, RemoteError
from kdcache.share import keys as layout

if TYPE_CHECKING:
    from kdcache.share.stores.base import Entry, Remote

_MAX_BYTES = 4096
_WORDS = {"intent": ("a push", layout.INTENTS, layout.intent_key), "mark": ("a gc", layout.MARKS, layout.mark_key)}
Kind = Literal["intent", "mark"]


def steady_clock() -> float:
    """Seconds that never go back and, where the system has such a clock, go on while the machine sleeps."""
    clock: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


@dataclass(frozen=True)
class Pace:
    """Times in seconds, and where they come from.

    Tests set the clock; without ``background`` the owner renews by ``Lease.beat``.
    """

    ttl: float = 120.0  # without a renewal for so long, an owner is dead
    renew: float = 30.0
    patience: float = 600.0  # that a push waits for a gc
    poll: float = 2.0
    clock: Callable[[], float] = steady_clock
    sleep: Callable[[float], None] = time.sleep
    background: bool = True


@dataclass
class Lease:
    """A held intent or mark."""

    remote: Remote
    key: str
    pace: Pace
    epoch: int = 0
    _renewed: float = 0.0  # steady clock, when the last successful renewal began
    _over: threading.Event = field(default_factory=threading.Event)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def renew(self) -> None:
        """Write it again. Raises RemoteError."""
        began = self.pace.clock()
        body = {"host": socket.gethostname()[:200], "pid": os.getpid(), "token": secrets.token_hex(8)}
        self.remote.write(self.key, canonical_json(body))
        with self._guard:
            self._end_epoch_if_late(self.pace.clock())
            self._renewed = began

    def beat(self) -> None:
        """Renew where nothing does so in the background and it is time to. Raises RemoteError."""
        if not self.pace.background and self.pace.clock() - self._renewed >= self.pace.renew:
            self.renew()

    def holds(self, epoch: int) -> bool:
        """Whether it was alive without a gap since ``epoch`` was the current one."""
        with self._guard:
            self._end_epoch_if_late(self.pace.clock())
            return self.epoch == epoch

    def _end_epoch_if_late(self, now: float) -> None:
        """A quarter of the time to live is kept for clocks of whole seconds and for requests under way."""
        if now - self._renewed > 0.75 * self.pace.ttl:
            self.epoch += 1
            self._renewed = now - 0.75 * self.pace.ttl  # counted; the next gap counts anew

    def run(self) -> None:
        """Renew in the background until the end; a failure is tried again at the next beat, and may end in a lapse."""
        while not self._over.wait(self.pace.renew):
            try:
                self.renew()
            except RemoteError:
                continue
            except BaseException:  # whatever ends this thread ends the renewals, and the owner finds its lease lapsed
                return

    def end(self) -> None:
        """No more renewals from here on."""
        self._over.set()


@contextlib.contextmanager
def hold(remote: Remote, kind: Kind, pace: Pace) -> Iterator[Lease]:
    """Hold an intent or a mark while the block runs.

    It is removed at the end, or lapses where that fails. Raises RemoteError.
    """
    token = secrets.token_hex(16)
    lease = Lease(remote, _WORDS[kind][2](token), pace, _renewed=pace.clock())
    lease.renew()
    thread = threading.Thread(target=lease.run, daemon=True, name=f"kdcache-{kind}")
    if pace.background:
        thread.start()
    try:
        yield lease
    finally:
        lease.end()
        if pace.background:
            thread.join(5.0)  # so that no renewal comes after the removal
        with contextlib.suppress(RemoteError):
            remote.delete(lease.key)


def alive(remote: Remote, kind: Kind, pace: Pace) -> list[Entry]:
    """The intents or marks that were renewed within the time to live, on the store's clock."""
    entries = [entry for entry in remote.list(_WORDS[kind][1]) if layout.is_lease_key(entry.key)]
    if not entries:
        return []
    now = remote.now()
    return [entry for entry in entries if now - entry.modified <= pace.ttl]


def refuse_if_alive(remote: Remote, kind: Kind, pace: Pace) -> None:
    """Raises LockedError, naming the owner, where one is alive."""
    living = alive(remote, kind, pace)
    if living:
        raise LockedError(
            f"{_WORDS[kind][0]} is under way on {remote.url}, by {_owner(remote, living[0].key)}",
            f"Wait until it has ended and run this again; a dead one counts for nothing after {pace.ttl:.0f} seconds.",
        )


def wait_until_none(remote: Remote, kind: Kind, pace: Pace, lease: Lease, note: Callable[[str], None]) -> None:
    """Wait until none is alive, renewing ``lease`` meanwhile. Raises LockedError when patience ends."""
    began, told = pace.clock(), False
    while True:
        lease.beat()
        if pace.clock() - began > pace.patience:
            refuse_if_alive(remote, kind, pace)
        living = alive(remote, kind, pace)
        if not living:
            return
        if not told:
            note(
                f"{_WORDS[kind][0]} is under way on {remote.url}, by {_owner(remote, living[0].key)}: waiting for its "
                "end"
            )
            told = True
        pace.sleep(pace.poll)


def _owner(remote: Remote, key: str) -> str:
    try:
        body: Any = parse_json(remote.read_bytes(key, _MAX_BYTES))
        return f"process {int(body['pid'])} on {str(body['host'])[:80]!r}"
    except (KdcacheError, NotCanonicalError, KeyError, TypeError, ValueError):
        return "somebody"
