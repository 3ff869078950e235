"""Kept arrays: found again by every process, never wrong, and never worse than making them anew."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdcache import kept
from kdcache.files import Disk, use_disk
from kdcache.kept import Kept, kept_or_made
from kdcache.runs import home
from kdcache.testing.power_cut import watched

KEY = "ab" * 32
ARRAYS = {
    "rows": np.arange(1000, dtype=np.uint16),
    "ids": np.arange(64, dtype=np.uint8).reshape(4, 16),
    "none": np.zeros((0, 16), np.uint8),
    "flags": np.array([True, False, True]),
    "numbers": np.array([2**40, -1]),
}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kept, "_told", [])


def made() -> Kept:
    return Kept(ARRAYS, {"skipped": 3})


def refuse() -> Kept:
    raise AssertionError("made again although it is kept")


def same(one: Kept) -> bool:
    assert one.document == {"skipped": 3} and list(one.arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert one.arrays[name].dtype == array.dtype and one.arrays[name].shape == array.shape
        assert np.array_equal(one.arrays[name], array)
    return True


def files() -> list[Path]:
    return sorted(path for path in home().rglob("*") if path.is_file() and path.name != "lock")


def forget() -> None:
    """As a new process."""
    kept._found_whole.clear()


def test_what_was_made_is_mapped_by_whoever_comes_later() -> None:
    assert same(kept_or_made("things", KEY, made))
    (path,) = files()
    assert path == home() / "things" / f"{KEY}.bin"
    forget()
    again = kept_or_made("things", KEY, refuse)
    assert same(again)
    assert not again.arrays["rows"].flags.writeable and again.arrays["rows"].base is not None
    kept_or_made("things", "cd" * 32, made)
    assert len(files()) == 2, "another key is another file"


def every_byte_once(data: bytes) -> list[bytes]:
    places = [*range(0, len(data) - 400, 97), *range(len(data) - 400, len(data))]
    return [data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :] for at in places]


def test_a_damaged_file_is_made_again() -> None:
    kept_or_made("things", KEY, made)
    (path,) = files()
    sound = path.read_bytes()
    cut = [sound[:length] for length in (0, 1, 40, 60, len(sound) // 2, len(sound) - 1)]
    for data in [*cut, sound + b"\0", sound[64:], *every_byte_once(sound)]:
        path.write_bytes(data)
        forget()
        assert kept._mapped(path) is None
    assert same(kept_or_made("things", KEY, made))
    assert path.read_bytes() == sound


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["arrays"]["rows"].update(dtype="|O8"),
        lambda document: document["arrays"]["rows"].update(shape=[10**9]),
        lambda document: document["arrays"]["rows"].update(shape=[-1]),
        lambda document: document["arrays"]["rows"].update(at=-64),
        lambda document: document.pop("document"),
        lambda document: document.update(arrays=[1]),
    ],
)
def test_a_forged_document_is_made_again(change: Callable[[dict[str, object]], object]) -> None:
    """The sum is right: only what it describes is not there."""
    kept_or_made("things", KEY, made)
    (path,) = files()
    data = path.read_bytes()[:-32]
    length = int.from_bytes(data[-16:-8], "little")
    document = json.loads(data[-16 - length : -16])
    change(document)
    forged = json.dumps(document).encode()
    body = data[: -16 - length] + forged + len(forged).to_bytes(8, "little") + data[-8:]
    path.write_bytes(body + kept.hashlib.sha256(body).digest())
    forget()
    assert same(kept_or_made("things", KEY, made))


@pytest.mark.parametrize("where", ["file in the way", "full", "no locks"])
def test_without_a_place_the_arrays_stay_in_memory(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    if where == "file in the way":
        (tmp_path / "home").write_bytes(b"a file")
    elif where == "full":

        class Full(Disk):
            def fsync(self, _: Path) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

        with use_disk(Full()):
            assert same(kept_or_made("things", KEY, made))
        assert not files(), "nothing half-written is left behind"
    else:

        def none(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", none)
    for _ in range(2):
        if where != "full":
            assert same(kept_or_made("things", KEY, made))
    assert len(caplog.records) == 1 and "nothing can be kept" in caplog.text


def test_what_make_raises_is_raised_and_nothing_is_kept() -> None:
    with pytest.raises(AssertionError, match="made again"):
        kept_or_made("things", KEY, refuse)
    assert not files()
    assert same(kept_or_made("things", KEY, made)), "the lock is free again"


WRITER = """
import os, sys
import numpy as np
from kdcache import files
from kdcache.kept import Kept, kept_or_made

class Dies(files.Disk):
    def rename(self, source, target):
        os.kill(os.getpid(), 9)

def make():
    print("made", flush=True)
    if sys.argv[1] == "waits":
        sys.stdin.readline()
    return Kept({"rows": np.arange(100_000)}, {})

files.disk = Dies() if sys.argv[1] == "dies" else files.disk
found = kept_or_made("things", "ab" * 32, make)
print(int(found.arrays["rows"].sum()), flush=True)
"""


def process(how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_writer_that_is_killed_leaves_nothing_that_is_used() -> None:
    with process("dies") as first:
        assert first.communicate()[0] == "made\n" and first.returncode == -9
    (left,) = files()
    assert left.name.endswith(".tmp")
    with process("lives") as second:
        assert second.communicate()[0].split() == ["made", str(sum(range(100_000)))]
    assert [path.name for path in files()] == [f"{KEY}.bin"], "what the killed one left is removed"


def test_two_processes_make_it_once() -> None:
    with process("waits") as first, process("waits") as second:
        printed: list[str] = []
        readers = [
            threading.Thread(target=lambda one=one: printed.append(one.stdout.readline())) for one in (first, second)
        ]
        for reader in readers:
            reader.start()
        while "made\n" not in printed:
            readers[0].join(0.01)
        for one in (first, second):
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
        for reader in readers:
            reader.join()
        rest = [one.communicate()[0] for one in (first, second)]
        assert (printed + rest).count("made\n") == 1 and first.returncode == second.returncode == 0
        assert sum(str(sum(range(100_000))) in text for text in printed + rest) == 2


def test_the_file_has_its_name_when_its_bytes_are_safe(tmp_path: Path) -> None:
    with watched(tmp_path, unsafe=("*/lock",)) as watch:
        kept_or_made("things", KEY, made)
        lost = watch.lost()
    assert watch.wrong == [] and lost == []


def test_the_least_recently_used_files_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"{number:064x}" for number in range(4)]
    for number, key in enumerate(keys[:3]):
        kept_or_made("things", key, made)
        os.utime(home() / "things" / f"{key}.bin", (number, 10))
    size = files()[0].stat().st_size
    monkeypatch.setattr(kept, "LIMIT", 3 * size)
    mapped = kept_or_made("things", keys[0], refuse)  # the oldest is used again
    kept_or_made("things", keys[3], made)
    assert [path.stem for path in files()] == [keys[0], keys[2], keys[3]]
    monkeypatch.setattr(kept, "LIMIT", 0)
    kept_or_made("things", keys[1], made)
    assert [path.stem for path in files()] == [keys[1]], "one that is larger than all is kept alone"
    assert same(mapped), "whoever mapped a removed file has it"
