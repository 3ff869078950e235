"""``kdcache remote check`` tells strong stores from weak and broken ones, and leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcache.errors import RemoteError
from kdcache.share.stores.base import Entry
from kdcache.share.stores.probe import check
from kdcache.testing.memory_remote import MemoryRemote
from kdcache.testing.s3_server import S3Server
from tests.cli.commands import kdcache


def found(document: dict[str, Any]) -> dict[str, bool | None]:
    return {one["name"]: one["holds"] for one in document["guarantees"]}


NEEDED = {"whole objects": True, "ranges": True, "list after write": True, "deletes": True}


def test_a_directory(tmp_path: Path) -> None:
    said = kdcache("remote", "check", tmp_path, "--json")
    assert said.code == 0
    assert found(said.document) == NEEDED | {
        "decided creates": True,
        "compare and swap": None,
        "clock": True,
        "other machines": None,
    }
    assert "none is lost" in said.document["verdict"]
    assert list(tmp_path.iterdir()) == []


def test_a_real_store(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweedfs.environment().items():
        monkeypatch.setenv(name, value)
    url = seaweedfs.url()
    monkeypatch.setenv("KDCACHE_REMOTE", url)
    said = kdcache("remote", "check", "--json")
    assert said.code == 0, said.err
    assert found(said.document) == NEEDED | {"decided creates": True, "compare and swap": True, "clock": True}
    assert seaweedfs.endpoint in said.document["url"]
    assert list(seaweedfs.open(url).list("")) == []


def test_read_only_credentials(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweedfs.environment(seaweedfs.reader).items():
        monkeypatch.setenv(name, value)
    said = kdcache("remote", "check", seaweedfs.url())
    assert said.code == 0
    assert "may read and not write" in said.out


def test_a_store_that_ignores_conditions_is_recognised(rclone_store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rclone_store.environment().items():
        monkeypatch.setenv(name, value)
    url = rclone_store.url()
    said = kdcache("remote", "check", url, "--json")
    assert said.code == 0
    assert found(said.document) == NEEDED | {"decided creates": False, "compare and swap": False, "clock": True}
    assert "fork" in said.document["verdict"]
    assert list(rclone_store.open(url).list("")) == []


class LateLists(MemoryRemote):
    """Shows an object only in the second list after its write."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def list(self, prefix: str) -> Iterator[Entry]:
        entries = list(super().list(prefix))
        shown = [entry for entry in entries if entry.key in self._seen]
        self._seen |= {entry.key for entry in entries}
        return iter(shown)


class WholeRanges(MemoryRemote):
    """Answers every range with the whole object."""

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:  # noqa: ARG002
        return super().read(key)


class BeliefInAll(MemoryRemote):
    """Says that it decides creates, and does so only for writers that come one after the other."""

    def create(self, key: str, data: bytes) -> bool:
        if self.head(key):
            return False
        threading.Event().wait(0.01)
        self.write(key, data)
        return True


class NoDeletes(MemoryRemote):
    """Lets nobody delete."""

    def delete(self, key: str) -> None:
        raise RemoteError(f"cannot delete '{key}'")


@pytest.mark.parametrize(
    ("remote", "fails", "usable"),
    [
        (LateLists(), "list after write", False),
        (WholeRanges(), "ranges", False),
        (BeliefInAll(), "decided creates", True),
        (NoDeletes(), "deletes", True),
        (MemoryRemote(conditional=False), "decided creates", True),
    ],
)
def test_what_a_store_does_not_keep_is_found(remote: MemoryRemote, fails: str, usable: bool) -> None:
    report = check(remote)
    assert [finding.name for finding in report.findings if finding.holds is False] == [fails]
    assert report.usable is usable
    assert report.verdict
    if not isinstance(remote, NoDeletes):
        remaining = set(remote.objects)
        assert not remaining or isinstance(remote, LateLists)
    else:
        assert report.leftovers


def test_a_clock_that_is_wrong_is_told() -> None:
    remote = MemoryRemote()
    remote.advance(3600)
    report = check(remote)
    assert "3600 seconds ahead" in next(finding.meaning for finding in report.findings if finding.name == "clock")
    assert report.usable


def test_an_unusable_store_exits_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.share.stores.registry.open_remote", lambda _: LateLists())
    said = kdcache("remote", "check", tmp_path)
    assert said.code == 1
    assert "cannot hold caches: no list after write" in said.err
