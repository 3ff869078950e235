"""Real processes on real remotes: killed at random moments, racing for a name, with credentials that may only read.

Children are forked from a server that has the imports done and has asked nothing of a store; each gets a remote by its
URL.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from kdcache.cache.manifest import read_manifest
from kdcache.cache.selection import Selection
from kdcache.cache.verify import unreferenced, verify
from kdcache.errors import RemoteAccessError
from kdcache.files import use_disk
from kdcache.share import keys as layout
from kdcache.share.pull import pull
from kdcache.share.push import push
from kdcache.share.refs import history, resolve
from kdcache.share.remote_verify import verify_remote
from kdcache.share.stores.base import Remote
from kdcache.share.stores.directory import DirectoryRemote
from kdcache.share.stores.registry import open_remote
from kdcache.testing.caches import dump, made_plan
from kdcache.testing.faults import Died, UnsyncedDisk
from kdcache.testing.faulty_remote import FaultyRemote
from kdcache.testing.s3_server import S3Server
from tests.cli.commands import kdcache
from tests.share.conftest import MEMORY
from tests.share.worlds import broken_refs

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["kdcache.share.push", "kdcache.share.pull", "kdcache.share.stores.registry", __name__])
MOMENTS = 10


@dataclass(frozen=True)
class Place:
    """Where remotes of a kind are made: new ones by ``url``, opened here or, with ``environment``, in a child."""

    url: Callable[[], str]
    open: Callable[[str], Remote]
    environment: Mapping[str, str] = field(default_factory=dict)


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("seaweedfs")
        return Place(server.url, server.open, server.environment())
    made = iter(range(1000))

    def url() -> str:
        path = tmp_path / f"team-{next(made)}"
        path.mkdir()
        return str(path)

    return Place(url, lambda where: DirectoryRemote(Path(where)))


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    """Some 120 small files, so that a push takes long enough to be killed on the way."""
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="kdcache-test-") as directory:
        dump(Path(directory) / "cache", made_plan(24, 8, ["bert", "roberta"]))
        yield Path(directory) / "cache"


def _child(
    pipe: Connection, environment: Mapping[str, str], work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    with use_disk(UnsyncedDisk()):
        pipe.send("ready")
        pipe.recv()
        work(*arguments)
        pipe.send("done")


def _push(url: str, cache: Path, name: str) -> None:
    push(open_remote(url), cache, name)


def _pull(url: str, name: str, target: Path) -> None:
    pull(open_remote(url), name, target)


def _pushes(url: str, caches: list[Path], name: str) -> None:
    for one in caches:
        push(open_remote(url), one, name)


class Child:
    """A process that is ready and waits for ``go``."""

    def __init__(self, place: Place, work: Callable[..., None], *arguments: Any) -> None:
        self._pipe, other = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_child, args=(other, dict(place.environment), work, arguments))
        self.process.start()
        other.close()
        assert self._pipe.recv() == "ready"

    def go(self) -> None:
        self._pipe.send("go")

    def finish(self) -> float:
        """Seconds until it was done."""
        began = time.monotonic()
        assert self._pipe.recv() == "done"
        took = time.monotonic() - began
        self.process.join()
        assert self.process.exitcode == 0
        return took

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def moments(work: Callable[[], Child]) -> list[float]:
    """Seconds, at random within the time that an undisturbed run takes."""
    child = work()
    child.go()
    took = child.finish()
    chosen = sorted(random.Random().uniform(0, 0.9 * took) for _ in range(MOMENTS))
    print("killed after", [round(one, 3) for one in chosen], f"of {took:.3f} s")  # shown where the test fails
    return chosen


def objects(remote: Remote, prefix: str) -> set[str]:
    return {entry.key for entry in remote.list(prefix)}


def file_keys(cache: Path) -> set[str]:
    return {layout.file_key(digest.sha256) for digest in read_manifest(cache).contents.files.values()}


def test_a_push_that_dies_at_every_request_in_turn(place: Place, caches: dict[str, Path]) -> None:
    cache = caches["one"]  # few files: the work grows with the square of their number
    counted = FaultyRemote(place.open(place.url()))
    push(counted, cache, "sst2", workers=1)
    requests, files = sum(counted.requests.values()), objects(counted, "files/")
    assert requests > 15
    for step in range(1, requests + 1):
        remote = place.open(place.url())
        with pytest.raises(Died):
            push(FaultyRemote(remote, die_at=step), cache, "sst2", workers=1)
        assert broken_refs(remote) == []
        arrived = objects(remote, "files/")
        second = FaultyRemote(remote)
        assert push(second, cache, "sst2", workers=1).reference == "sst2@1", f"request {step}"
        sent = {line.split()[1] for line in second.log if line.startswith("write files/")}
        assert (sent & arrived, sent | arrived) == (set(), files), f"request {step}"
        assert [ref.number for ref in history(remote, "sst2")] == [1]
        assert broken_refs(remote) == []


def test_a_pull_that_dies_at_every_request_in_turn(place: Place, caches: dict[str, Path], tmp_path: Path) -> None:
    remote = place.open(place.url())
    push(remote, caches["one"], "sst2")
    counted = FaultyRemote(remote)
    total = pull(counted, "sst2", tmp_path / "counted", workers=1).files_fetched
    for step in range(1, sum(counted.requests.values()) + 1):
        target = tmp_path / f"died-{step}"
        first = FaultyRemote(remote, die_at=step)
        with pytest.raises(Died):
            pull(first, "sst2", target, workers=1)
        assert not (target / "manifest.json").exists()
        begun = sum(line.startswith("read files/") for line in first.log)
        second = FaultyRemote(remote)
        pull(second, "sst2", target, workers=1)
        assert sum(line.startswith("read files/") for line in second.log) <= total - max(begun - 1, 0), (
            f"request {step}"
        )
        assert verify(target) == []
        assert unreferenced(target) == []


def test_a_push_that_is_killed_at_random_moments(place: Place, cache: Path) -> None:
    """A server goes on with the requests of a dead process, so files may arrive after the listing and while the next
    push works.
    """
    for moment in moments(lambda: Child(place, _push, place.url(), cache, "sst2")):
        url = place.url()
        child = Child(place, _push, url, cache, "sst2")
        child.go()
        time.sleep(moment)
        child.kill()
        remote = place.open(url)
        assert broken_refs(remote) == []
        arrived = objects(remote, "files/")
        counting = FaultyRemote(remote)
        report = push(counting, cache, "sst2")
        assert report.reference == "sst2@1"
        sent = {line.split()[1] for line in counting.log if line.startswith("write files/")}
        assert sent.isdisjoint(arrived)  # nothing that was there is sent again
        assert objects(remote, "files/") == file_keys(cache)
        assert broken_refs(remote) == []
        assert [ref.number for ref in history(remote, "sst2")] == [1]


def test_a_pull_that_is_killed_at_random_moments(place: Place, cache: Path, tmp_path: Path) -> None:
    url = place.url()
    remote = place.open(url)
    push(remote, cache, "sst2")
    files = read_manifest(cache).contents.files
    for number, moment in enumerate(moments(lambda: Child(place, _pull, url, "sst2", tmp_path / "whole"))):
        target = tmp_path / f"killed-{number}"
        child = Child(place, _pull, url, "sst2", target)
        child.go()
        time.sleep(moment)
        child.kill()
        if (target / "manifest.json").exists():
            assert verify(target) == []
        there = {digest.sha256 for path, digest in files.items() if (target / path).exists()}
        counting = FaultyRemote(remote)
        pull(counting, "sst2", target)
        fetched = {layout.parse_file_key(line.split()[1]) for line in counting.log if line.startswith("read files/")}
        assert fetched.isdisjoint(there)
        assert verify(target) == []
        assert unreferenced(target) == []


def test_eight_processes_push_versions_of_one_name(place: Place, tmp_path: Path) -> None:
    """Sixteen manifests over the same files: none is lost, and the history is one line."""
    plan = made_plan(4, 2, ["bert"])
    made = [tmp_path / f"cache-{number}" for number in range(16)]
    for number, path in enumerate(made):
        dump(path, plan, provenance={"command": f"made by {number}"})
    url = place.url()
    children = [Child(place, _pushes, url, made[2 * number : 2 * number + 2], "sst2") for number in range(8)]
    for child in children:
        child.go()
    for child in children:
        child.finish()
    refs = history(place.open(url), "sst2")
    assert [ref.number for ref in refs] == list(range(1, 17))
    assert len({ref.manifest for ref in refs}) == 16
    for number in range(8):
        mine = [
            ref.number for ref in refs for path in made[2 * number : 2 * number + 2] if ref.manifest == _sha256(path)
        ]
        assert mine == sorted(mine) and len(mine) == 2
    assert broken_refs(place.open(url)) == []
    assert objects(place.open(url), "intents/") == set()


def _sha256(cache: Path) -> str:
    from kdcache.files import digest_bytes

    return digest_bytes((cache / "manifest.json").read_bytes()).sha256


def test_a_part_of_what_is_on_a_real_store(seaweedfs: S3Server, cache: Path, tmp_path: Path) -> None:
    remote = FaultyRemote(seaweedfs.open())
    push(remote, cache, "sst2", tag="v1")
    before = remote.down["read"]
    report = pull(remote, "sst2@v1", tmp_path / "c", Selection({"bert": ()}, text=False))
    assert (
        remote.down["read"] - before
        == report.bytes_fetched
        < sum(one.size for one in read_manifest(cache).contents.files.values()) / 2
    )
    assert verify(tmp_path / "c") == []
    pull(remote, "sst2", tmp_path / "c")
    assert verify(tmp_path / "c") == []
    ref = resolve(remote, "sst2")
    assert verify_remote(remote, ref, share=1.0) == []
    key = next(iter(sorted(objects(remote, "files/"))))
    remote.remote.write(key, remote.remote.read_bytes(key, 1 << 20)[:-1])
    assert [damage.file for damage in verify_remote(remote, ref)] == [key]


def test_credentials_that_may_only_read(
    seaweedfs: S3Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = seaweedfs.open()
    push(writer, cache, "sst2")
    url = writer.url[: writer.url.index(" ")] if " " in writer.url else writer.url
    assert seaweedfs.reader is not None
    reader = seaweedfs.open(url, seaweedfs.reader)
    with pytest.raises(RemoteAccessError, match="push needs write access to"):
        push(reader, cache, "other")
    assert objects(writer, "") == objects(reader, "")
    pull(reader, "sst2", tmp_path / "c")
    for name, value in seaweedfs.environment(seaweedfs.reader).items():
        monkeypatch.setenv(name, value)
    for command in (["push", cache, "--name", "other"], ["rm", "sst2"], ["gc", "--delete"]):
        said = kdcache("cache", *command, "--remote", url)
        assert said.code == 1
        assert said.err.splitlines()[-1].startswith("hint: ") and len(said.err.splitlines()) <= 3
        assert seaweedfs.reader.secret not in said.err and "Traceback" not in said.err
    assert kdcache("cache", "push", cache, "--name", "other", "--dry-run", "--remote", url).code == 0
    assert kdcache("cache", "ls", "--url", url).code == 0


def test_control_c_ends_at_once_and_says_how_to_go_on(tmp_path: Path, cache: Path) -> None:
    """In the middle of a file that does not end: the process does not wait for it."""
    (tmp_path / "team").mkdir()
    code = (
        "import os, time, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from kdcache.share.stores import directory\n"
        "def write(self, key, source):\n"
        "    if key.startswith('files/'): os.write(1, b'sending\\n'); time.sleep(100_000)\n"
        "    else: real(self, key, source)\n"
        "real, directory.DirectoryRemote.write = directory.DirectoryRemote.write, write\n"
        "from kdcache.cli.main import main\n"
        f"main(['cache', 'push', {str(cache)!r}, '--name', 'sst2', '--remote', {str(tmp_path / 'team')!r}])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "sending\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=200)  # far less than the file takes, and more than a busy machine does
    assert process.returncode == 130
    assert "Continue with the same command" in said
    assert not list((tmp_path / "team").glob("intents/*"))
