"""Fault injection: a disk that dies or fails at its n-th step, and functions that damage a cache.

    python -m kdcache.testing.faults --count steps.txt -- dump-teachers recipe.toml
    python -m kdcache.testing.faults --die-at 17 -- dump-teachers recipe.toml
    python -m kdcache.testing.faults --fail-at 17 -- dump-teachers recipe.toml

A step is one system call of ``kdcache.files`` that matters for durability: write, fsync, rename, fsync of a directory,
making a directory, removing a file. Dying at a write leaves half of the data, as a power cut may. A separate process
dies by ``os._exit``: nothing is cleaned up. Inside a test ``Died`` is raised, which no ``except Exception`` catches.
Every later step raises it too.
"""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kdcache import files
from kdcache.cache import layout
from kdcache.cache.canonical import digest_of, parse_json, readable_json
from kdcache.files import Buffer, Disk

EXIT_CODE = 137  # exit status of a process that died here, as after SIGKILL


class Died(BaseException):
    """Stands for the death of the process in a test that continues."""


class UnsyncedDisk(Disk):
    """Skips fsync: for tests that write many small files and need no durability."""

    def fsync(self, path: Path) -> None:
        pass

    def fsync_directory(self, path: Path) -> None:
        pass


class FaultyDisk(Disk):
    """Counts the steps of a disk and, at step ``at`` (from 1), calls ``strike``, which must raise or exit."""

    def __init__(
        self,
        at: int | None = None,
        strike: Callable[[], NoReturn] | None = None,
        *,
        once: bool = False,
        real: Disk | None = None,
    ) -> None:
        self.steps: list[str] = []
        self._at, self._strike, self._once = at, strike, once
        self._real = real or files.disk

    def write(self, path: Path, buffers: Iterable[Buffer]) -> None:
        if self._comes("write", path):
            data = b"".join(bytes(buffer) for buffer in buffers)
            self._real.write(path, [data[: len(data) // 2]])
            self._hit()
        self._real.write(path, buffers)

    def fsync(self, path: Path) -> None:
        self._step("fsync", path)
        self._real.fsync(path)

    def link(self, source: Path, target: Path) -> None:
        self._step("link", target)
        self._real.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        self._real.rename(source, target)

    def fsync_directory(self, path: Path) -> None:
        self._step("fsync directory", path)
        self._real.fsync_directory(path)

    def make_directory(self, path: Path) -> None:
        self._step("make directory", path)
        self._real.make_directory(path)

    def remove(self, path: Path) -> None:
        self._step("remove", path)
        self._real.remove(path)

    def _step(self, name: str, path: Path) -> None:
        if self._comes(name, path):
            self._hit()

    def _comes(self, name: str, path: Path) -> bool:
        self.steps.append(f"{name} {path}")
        if self._at is None:
            return False
        return len(self.steps) == self._at or (len(self.steps) > self._at and not self._once)

    def _hit(self) -> NoReturn:
        assert self._strike is not None
        self._strike()


def counting_disk() -> FaultyDisk:
    """A disk that works and records its steps."""
    return FaultyDisk()


def dying_disk(at: int) -> FaultyDisk:
    """Raises ``Died`` at step ``at`` and at every step after it."""

    def die() -> NoReturn:
        raise Died

    return FaultyDisk(at, die)


def failing_disk(at: int, number: int = errno.ENOSPC, *, once: bool = False) -> FaultyDisk:
    """Raises OSError (by default: disk full) at step ``at`` and, unless ``once``, at every step after it."""

    def fail() -> NoReturn:
        raise OSError(number, os.strerror(number))

    return FaultyDisk(at, fail, once=once)


def run_with_fault(
    arguments: Sequence[str], *, die_at: int | None = None, fail_at: int | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a kdcache command line in a separate process, with a fault at a step.

    ``options`` go to ``subprocess.run``.
    """
    mode = ["--die-at", str(die_at)] if die_at is not None else ["--fail-at", str(fail_at)]
    return _run([*mode, "--", *arguments], options)


def count_steps(arguments: Sequence[str], steps_file: Path, **options: Any) -> list[str]:
    """Run a kdcache command line in a separate process and list the steps of its disk.

    It must end with exit code 0.
    """
    done = _run(["--count", str(steps_file), "--", *arguments], options)
    if done.returncode:
        raise RuntimeError(f"kdcache {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return steps_file.read_text(encoding="utf-8").splitlines()


def flip_bit(path: Path, byte: int | None = None) -> None:
    """Flip one bit of a file; by default in its middle byte."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if byte is None else byte] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path, missing: int = 1) -> None:
    """Remove the last ``missing`` bytes of a file."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - missing)


def delete(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def empty(path: Path) -> None:
    """Make a file empty."""
    path.write_bytes(b"")


def swap(one: Path, other: Path) -> None:
    """Exchange two undamaged files."""
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], None], *, resign: bool = False) -> None:
    """Change the manifest of a cache; ``resign`` computes its identity and checksum again."""
    path = root / layout.MANIFEST
    document = parse_json(path.read_bytes())
    change(document)
    if resign:
        document.pop("identity", None)
        document.pop("checksum", None)
        document["identity"] = digest_of({key: value for key, value in document.items() if key != "provenance"})
        document["checksum"] = digest_of(document)
    path.write_bytes(readable_json(document))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a kdcache command line in this process with a faulty disk."""
    parser = argparse.ArgumentParser(prog="python -m kdcache.testing.faults", description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--die-at", type=int, metavar="N", help="end the process at step N, without any cleaning up")
    mode.add_argument("--fail-at", type=int, metavar="N", help="the disk is full from step N on")
    mode.add_argument("--count", type=Path, metavar="FILE", help="write the list of steps to FILE")
    parser.add_argument("command", nargs="+", help="arguments of kdcache, behind --")
    options = parser.parse_args(arguments)
    if options.die_at is not None:
        disk = FaultyDisk(options.die_at, lambda: os._exit(EXIT_CODE))
    else:
        disk = counting_disk() if options.count else failing_disk(options.fail_at)
    from kdcache.cli.main import main as run

    with files.use_disk(disk):
        try:
            run(options.command)
        finally:
            if options.count:
                options.count.write_text("".join(f"{step}\n" for step in disk.steps), encoding="utf-8")


def _run(arguments: Sequence[str], options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kdcache.testing.faults", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


if __name__ == "__main__":
    main()
