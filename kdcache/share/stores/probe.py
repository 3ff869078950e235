"""``kdcache remote check``: tests the guarantees of a store, and reports what they mean for a team.

The sharing protocol needs little (docs/decisions/0010): whole objects, ranges, and lists that show every completed
write. With conditional creates, versions of a name form one line; without, two simultaneous pushes make a fork, which
is reported. All probes are written under ``probes/`` and removed again.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kdcache.errors import KdcacheError, RemoteAccessError, RemoteError

if TYPE_CHECKING:
    from kdcache.share.stores.base import Remote

RACERS = 8
FOLDER = "probes"
SKEW = 5.0  # seconds of difference between two clocks that are not reported
_SIZE = 300_000  # bytes of the object that is read back
_SHARED = ("nfs", "nfs4", "cifs", "smb3", "9p", "lustre", "beegfs", "gpfs", "ceph", "afs")
_NEEDED = ("whole objects", "ranges", "list after write")


@dataclass(frozen=True)
class Finding:
    """One guarantee; ``holds`` is None if it could not be tried."""

    name: str
    holds: bool | None
    meaning: str


@dataclass(frozen=True)
class Report:
    """The findings; ``ahead``: seconds by which the store's clock is ahead of this machine's, None if unknown."""

    where: str
    writable: bool
    findings: Sequence[Finding]
    ahead: float | None = None
    leftovers: Sequence[str] = field(default=())

    def holds(self, name: str) -> bool | None:
        """Whether the guarantee of that name holds."""
        return next((finding.holds for finding in self.findings if finding.name == name), None)

    @property
    def usable(self) -> bool:
        """Whether caches can safely be pulled from here."""
        return all(self.holds(name) is not False for name in _NEEDED)

    @property
    def verdict(self) -> str:
        """The conclusion, in one or two sentences."""
        if not self.usable:
            return (
                "This store cannot hold caches: "
                + ", ".join(f"no {name}" for name in _NEEDED if self.holds(name) is False)
                + "."
            )
        if not self.writable:
            return "These credentials may read and not write: cache pull and ls work, push, rm and gc do not."
        if self.holds("decided creates"):
            return "Any number of people may push to one name at once: each version gets its own number, none is lost."
        return (
            "Caches are safe here, and no version is lost; but the store has no conditional creates. Two "
            "simultaneous pushes to one name become a fork, which every reader reports until the next push: let one "
            "person at a time push to a name."
        )


def check(remote: Remote) -> Report:
    """Try every guarantee. Raises RemoteError if the store cannot be reached or read."""
    list(remote.list(f"{FOLDER}/"))
    folder = f"{FOLDER}/check-{secrets.token_hex(8)}"
    findings: list[Finding] = []
    ahead = None
    try:
        remote.write(f"{folder}/first", b"kdcache remote check")
    except RemoteAccessError:
        findings.append(Finding("writing", False, "refused: these credentials are read-only here"))
        return Report(remote.where, False, [*findings, *_of_directory(remote)])
    leftovers: list[str] = []
    with _removed(remote, folder, leftovers):
        for name, trial in _TRIALS.items():
            findings.append(_try(name, trial, remote, folder))
        with suppress(KdcacheError):
            ahead = remote.now() - time.time()
    findings += [*([] if ahead is None else [_clock(ahead)]), *_of_directory(remote)]
    return Report(remote.where, True, findings, ahead, leftovers)


def _try(name: str, trial: Callable[[Remote, str], tuple[bool | None, str]], remote: Remote, folder: str) -> Finding:
    try:
        return Finding(name, *trial(remote, folder))
    except KdcacheError as error:
        return Finding(name, False, error.message)


def _whole(remote: Remote, folder: str) -> tuple[bool, str]:
    data = random.Random(0).randbytes(_SIZE)
    remote.write(f"{folder}/whole", data)
    same = remote.read_bytes(f"{folder}/whole", _SIZE) == data
    return same, "an object is read back byte for byte" if same else "an object is read back with other bytes"


def _ranges(remote: Remote, folder: str) -> tuple[bool, str]:
    data = random.Random(1).randbytes(_SIZE)
    remote.write(f"{folder}/ranges", data)
    asked = [(0, 10), (1000, 1), (123_456, 100_000), (_SIZE - 7, 7)]
    same = all(
        b"".join(remote.read(f"{folder}/ranges", start=at, length=count)) == data[at : at + count]
        for at, count in asked
    )
    return same, "an interrupted pull continues where it stopped" if same else "a part of an object is read back wrong"


def _list_after_write(remote: Remote, folder: str) -> tuple[bool, str]:
    for number in range(5):
        remote.write(f"{folder}/list/{number}", b"x")
        if len(list(remote.list(f"{folder}/list/"))) != number + 1:
            return False, "a list may lack a finished write: a gc could miss a push in progress"
    return True, "a list shows every finished write, so a gc sees every push"


def _delete(remote: Remote, folder: str) -> tuple[bool, str]:
    remote.write(f"{folder}/delete", b"x")
    remote.delete(f"{folder}/delete")
    gone = remote.head(f"{folder}/delete") is None and not list(remote.list(f"{folder}/delete"))
    return gone, "a deleted object is gone at once" if gone else "a deleted object is still listed: gc frees space late"


def _creates(remote: Remote, folder: str) -> tuple[bool, str]:
    """``conditional`` was found with two writers; this tries more, released by a barrier."""
    if not remote.conditional:
        return False, "the condition of a write is ignored: simultaneous creates of one object all succeed"
    gate = threading.Barrier(RACERS)

    def create(number: int) -> bool:
        gate.wait()
        return remote.create(f"{folder}/create", b"racer %d" % number)

    with ThreadPoolExecutor(RACERS) as pool:
        won = list(pool.map(create, range(RACERS)))
    there = remote.read_bytes(f"{folder}/create", 100)
    fair = [b"racer %d" % number for number, first in enumerate(won) if first] == [there]
    if not fair:
        return False, f"{sum(won)} of {RACERS} simultaneous creates of one object were reported as successful"
    return True, f"exactly one of {RACERS} simultaneous creates succeeded"


def _swaps(remote: Remote, _: str) -> tuple[bool | None, str]:
    swaps = remote.compares_and_swaps()
    if swaps is None:
        return None, "a directory has none; kdcache does not need it"
    return (
        (True, "available; kdcache does not need it") if swaps else (False, "not available; kdcache does not need it")
    )


_TRIALS: dict[str, Callable[[Remote, str], tuple[bool | None, str]]] = {
    "whole objects": _whole,
    "ranges": _ranges,
    "list after write": _list_after_write,
    "deletes": _delete,
    "decided creates": _creates,
    "compare and swap": _swaps,
}


def _clock(ahead: float) -> Finding:
    if abs(ahead) <= SKEW:
        return Finding("clock", True, "the store's clock is that of this machine, to a few seconds")
    words = f"the store's clock is {abs(ahead):.0f} seconds {'ahead of' if ahead > 0 else 'behind'} this machine's"
    return Finding(
        "clock", False, f"{words}; kdcache uses the store's clock, but signed requests fail if the two are far apart"
    )


def _of_directory(remote: Remote) -> list[Finding]:
    """What cannot be tried from one machine and follows from the type of the file system."""
    kind = remote.filesystem
    if not kind:
        return []
    if kind in _SHARED or kind.startswith("fuse"):
        return [
            Finding(
                "other machines", None,
                f"{kind} may keep a list on another machine for up to a minute (NFS: mount with acdirmax=1); let gc "
                "keep its grace period",
            )
        ]  # fmt: skip
    return [
        Finding(
            "other machines", None, f"{kind} is a disk of this machine: a team needs one that all its machines mount"
        )
    ]


@contextmanager
def _removed(remote: Remote, folder: str, leftovers: list[str]) -> Iterator[None]:
    """Delete the objects of ``folder`` and the clock probe afterwards; collects keys that could not be deleted."""
    try:
        yield
    finally:
        try:
            keys = [entry.key for entry in remote.list(f"{folder}/")]
        except RemoteError:
            keys = []
        for key in [*keys, f"{FOLDER}/clock"]:
            try:
                remote.delete(key)
            except RemoteError:
                leftovers.append(key)
        remote.remove_empty_folders(FOLDER)
