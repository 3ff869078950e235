"""Leases of a push (an intent) and of a gc (a mark): objects on the remote that their owner renews while it runs.

Nothing is locked. The owner of a lease that crashed renews it no more, and after its time to live, on the store's own
clock, the lease is expired. The owner's machine may also be suspended for longer than that. So the owner measures the
time since its last renewal on a clock that runs during suspend, and treats its lease as expired earlier than any other
process may. ``epoch`` counts how often that happened: what was learned in one epoch (which objects exist) must be
learned again in the next.
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
    """Seconds of a monotonic clock, one that also runs during suspend if the system has it."""
    clock: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


@dataclass(frozen=True)
class LeaseTiming:
    """Intervals of leases in seconds, and their clock; without ``background`` the owner renews with ``Lease.beat``."""

    ttl: float = 120.0  # a lease that was not renewed for so long is expired
    renew: float = 30.0
    patience: float = 600.0  # how long a push waits for a gc
    poll: float = 2.0
    clock: Callable[[], float] = steady_clock
    sleep: Callable[[float], None] = time.sleep
    background: bool = True


@dataclass
class Lease:
    """A held intent or mark."""

    remote: Remote
    key: str
    timing: LeaseTiming
    epoch: int = 0
    _renewed: float = 0.0  # steady clock, when the last successful renewal began
    _over: threading.Event = field(default_factory=threading.Event)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def renew(self) -> None:
        """Write the lease object again. Raises RemoteError."""
        began = self.timing.clock()
        body = {"host": socket.gethostname()[:200], "pid": os.getpid(), "token": secrets.token_hex(8)}
        self.remote.write(self.key, canonical_json(body))
        with self._guard:
            self._end_epoch_if_late(self.timing.clock())
            self._renewed = began

    def beat(self) -> None:
        """Renew if it is time and no background thread does. Raises RemoteError."""
        if not self.timing.background and self.timing.clock() - self._renewed >= self.timing.renew:
            self.renew()

    def holds(self, epoch: int) -> bool:
        """Whether the lease never expired since ``epoch`` was the current one."""
        with self._guard:
            self._end_epoch_if_late(self.timing.clock())
            return self.epoch == epoch

    def _end_epoch_if_late(self, now: float) -> None:
        """Expire after three quarters of the time to live: stores count whole seconds, and requests take time."""
        if now - self._renewed > 0.75 * self.timing.ttl:
            self.epoch += 1
            self._renewed = now - 0.75 * self.timing.ttl  # counted once; the next gap counts again

    def run(self) -> None:
        """Renew in the background until ``end``; a failed renewal is tried again at the next interval."""
        while not self._over.wait(self.timing.renew):
            try:
                self.renew()
            except RemoteError:
                continue
            except BaseException:  # no more renewals; the owner finds its lease expired
                return

    def end(self) -> None:
        """Stop renewing."""
        self._over.set()


@contextlib.contextmanager
def hold(remote: Remote, kind: Kind, timing: LeaseTiming) -> Iterator[Lease]:
    """Hold an intent or a mark while the block runs. Raises RemoteError (never for its removal: it expires)."""
    token = secrets.token_hex(16)
    lease = Lease(remote, _WORDS[kind][2](token), timing, _renewed=timing.clock())
    lease.renew()
    thread = threading.Thread(target=lease.run, daemon=True, name=f"kdcache-{kind}")
    if timing.background:
        thread.start()
    try:
        yield lease
    finally:
        lease.end()
        if timing.background:
            thread.join(5.0)  # so that no renewal comes after the removal
        with contextlib.suppress(RemoteError):
            remote.delete(lease.key)


def alive(remote: Remote, kind: Kind, timing: LeaseTiming) -> list[Entry]:
    """The intents or marks that were renewed within the time to live, on the store's clock."""
    entries = [entry for entry in remote.list(_WORDS[kind][1]) if layout.is_lease_key(entry.key)]
    if not entries:
        return []
    now = remote.now()
    return [entry for entry in entries if now - entry.modified <= timing.ttl]


def refuse_if_alive(remote: Remote, kind: Kind, timing: LeaseTiming) -> None:
    """Raises LockedError, which names the owner, if a lease of that kind is alive."""
    living = alive(remote, kind, timing)
    if living:
        raise LockedError(
            f"{_WORDS[kind][0]} is in progress on {remote.url}, by {_owner(remote, living[0].key)}",
            f"Wait until it ends and run this again. If it crashed, its lease expires after {timing.ttl:.0f} seconds.",
        )


def wait_until_none(remote: Remote, kind: Kind, timing: LeaseTiming, lease: Lease, note: Callable[[str], None]) -> None:
    """Wait until no such lease is alive, renewing ``lease``. Raises LockedError after ``timing.patience`` seconds."""
    began, noted = timing.clock(), False
    while True:
        lease.beat()
        if timing.clock() - began > timing.patience:
            refuse_if_alive(remote, kind, timing)
        living = alive(remote, kind, timing)
        if not living:
            return
        if not noted:
            note(
                f"{_WORDS[kind][0]} is in progress on {remote.url}, by {_owner(remote, living[0].key)}: waiting for it"
            )
            noted = True
        timing.sleep(timing.poll)


def _owner(remote: Remote, key: str) -> str:
    try:
        body: Any = parse_json(remote.read_bytes(key, _MAX_BYTES))
        return f"process {int(body['pid'])} on {str(body['host'])[:80]!r}"
    except (KdcacheError, NotCanonicalError, KeyError, TypeError, ValueError):
        return "an unknown process"
