"""The real client library on a wire that breaks: lost answers are recognised, bodies that break off are continued."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache.errors import RemoteError
from kdcache.share.stores import store_client
from kdcache.share.stores.object_store import ObjectStoreRemote, open_object_store
from kdcache.testing.broken_wire import Wire, broken_wire
from kdcache.testing.s3_server import S3Server

DATA = random.Random(0).randbytes(6_000_000)


@pytest.fixture
def wire(seaweedfs: S3Server) -> Iterator[Wire]:
    with broken_wire(seaweedfs.endpoint) as made:
        yield made


@pytest.fixture
def remote(seaweedfs: S3Server, wire: Wire) -> ObjectStoreRemote:
    opened = open_object_store(seaweedfs.url(), seaweedfs.environment() | {"AWS_ENDPOINT_URL": wire.endpoint})
    assert opened.conditional
    return opened


def test_the_lost_answer_to_a_create_is_no_conflict(remote: ObjectStoreRemote, wire: Wire) -> None:
    for number, lost in enumerate((1, 2)):
        wire.swallow(lost)
        assert remote.create(f"refs/x/{number}", b"mine")
        assert remote.read_bytes(f"refs/x/{number}", 9) == b"mine"
    wire.swallow()
    assert not remote.create("refs/x/1", b"theirs")
    assert remote.read_bytes("refs/x/1", 9) == b"mine"
    assert wire.struck == 4


def test_every_other_request_is_sent_again(remote: ObjectStoreRemote, wire: Wire, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(DATA * 2)
    for key, source in (("small", b"mine"), ("large", tmp_path / "large")):
        wire.swallow()
        remote.write(key, source)
    wire.swallow()
    assert [(entry.key, entry.size) for entry in remote.list("")] == [("large", 2 * len(DATA)), ("small", 4)]
    wire.swallow()
    assert remote.head("small") is not None
    wire.swallow()
    remote.delete("small")
    assert remote.head("small") is None
    assert wire.struck == 5


@pytest.mark.parametrize("after", [5, 300, 100_000, 3_000_000])
def test_a_body_that_breaks_off_is_continued(remote: ObjectStoreRemote, wire: Wire, after: int) -> None:
    remote.write("one", DATA)
    wire.cut(after)
    assert b"".join(remote.read("one")) == DATA
    wire.cut(after)
    assert b"".join(remote.read("one", start=7, length=4_000_000)) == DATA[7:4_000_007]
    assert wire.struck == 2


def test_a_wire_that_stays_broken_is_said(
    remote: ObjectStoreRemote, wire: Wire, seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(store_client._RETRIES, "max_retries", 1)
    remote = open_object_store(remote.url, seaweedfs.environment() | {"AWS_ENDPOINT_URL": wire.endpoint})
    remote.write("one", DATA)
    wire.cut(1000, 20)
    with pytest.raises(RemoteError, match="the connection broke") as caught:
        list(remote.read("one"))
    assert wire.endpoint in caught.value.message
