"""Finds data that a power cut would lose: watches the system calls for names and durability on the real file system.

    with watched(directory) as watch:
        dump(directory / "cache", plan)
    assert watch.wrong == [] and watch.lost() == []

It works below ``kdcache.files.Disk``, so it also detects a ``Disk`` that omits a step. The model is that of POSIX: the
bytes of a file are safe after an fsync that follows its last change, and a name is safe after an fsync of its directory
that follows the naming.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest import mock

State = tuple[int, int] | frozenset[tuple[str, int]]  # size and time of change; names and inodes in a directory


@dataclass
class Watch:
    """``wrong``: names that were given before their content, or anything written earlier, was safe."""

    root: Path
    unsafe: tuple[str, ...]  # patterns of names that need not be safe
    wrong: list[str] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(
        default_factory=list
    )  # of the call and the path below the root, in their order
    _safe: dict[int, State] = field(default_factory=dict)  # by inode, when it was last fsynced
    _one: threading.Lock = field(default_factory=threading.Lock)  # thread that fsyncs

    def lost(self, place: Path | None = None) -> list[str]:
        """The names and the file contents below ``place`` (default: the root) that a power cut would lose now."""
        found = []
        for directory, _, names in _walk(place or self.root):
            safe = self._safe.get(directory.stat().st_ino, frozenset())
            assert isinstance(safe, frozenset)
            for name in names:
                path = directory / name
                if self._needs_no_safety(path):
                    continue
                inode = path.lstat()
                if (name, inode.st_ino) not in safe:
                    found.append(f"{self._below(path)}: its name")
                elif stat.S_ISREG(inode.st_mode) and self._safe.get(inode.st_ino) != (inode.st_size, inode.st_mtime_ns):
                    found.append(f"{self._below(path)}: its bytes")
        return sorted(found)

    def _begin(self) -> None:
        for directory, _, names in _walk(self.root):
            self._safe[directory.stat().st_ino] = frozenset((name, (directory / name).lstat().st_ino) for name in names)
            self._safe |= {
                inode.st_ino: (inode.st_size, inode.st_mtime_ns) for name in names if (inode := _file(directory / name))
            }

    def _synced(self, handle: int) -> None:
        inode = os.fstat(handle)
        if stat.S_ISDIR(inode.st_mode):
            names = os.listdir(handle)
            self._safe[inode.st_ino] = frozenset(
                (name, os.stat(name, dir_fd=handle, follow_symlinks=False).st_ino) for name in names
            )
        else:
            self._safe[inode.st_ino] = (inode.st_size, inode.st_mtime_ns)
        self.calls.append(("fsync", str(inode.st_ino)))

    def _named(self, call: str, source: Path | None, target: Path) -> None:
        """Check, before ``target`` gets its name, that its content and all earlier writes are safe."""
        if not target.is_relative_to(self.root):
            return
        self.calls.append((call, self._below(target)))
        if self._needs_no_safety(target):
            return
        if source is not None and source.is_file():
            inode = source.stat()
            if self._safe.get(inode.st_ino) != (inode.st_size, inode.st_mtime_ns):
                self.wrong.append(f"{self._below(target)} got its name before its bytes were safe")
        elif source is not None:
            self.wrong += [f"{self._below(target)} got its name before {one} was safe" for one in self.lost(source)]
        self.wrong += [f"{self._below(target)} got its name before {one} was safe" for one in self.lost()]

    def _needs_no_safety(self, path: Path) -> bool:
        parts = path.relative_to(self.root).parts if path.is_relative_to(self.root) else ()
        return any(part.endswith(".tmp") for part in parts) or any(
            fnmatch("/".join(parts), pattern) for pattern in self.unsafe
        )

    def _below(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


@contextlib.contextmanager
def watched(root: Path, *, unsafe: tuple[str, ...] = ()) -> Iterator[Watch]:
    """Watch writes below ``root``, which exists; its present content counts as safe.

    ``unsafe``: patterns of paths below the root that need not be safe, such as locks. One thread at a time may write
    there.
    """
    watch = Watch(root, unsafe)
    watch._begin()
    with contextlib.ExitStack() as patches:

        def patch(name: str, around: Callable[..., Any]) -> None:
            patches.enter_context(mock.patch.object(os, name, around(getattr(os, name))))

        patch("fsync", lambda real: _syncing(watch, real))
        for name in ("replace", "rename", "link"):
            patch(name, lambda real, name=name: _naming(watch, name, real))
        patch("mkdir", lambda real: _making(watch, real))
        yield watch


def _syncing(watch: Watch, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(handle: Any) -> None:
        with watch._one:  # else a thread may overwrite the names of a directory with those of a moment before
            real(handle)
            watch._synced(_number(handle))

    return call


def _naming(watch: Watch, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(source: Any, target: Any, **options: Any) -> Any:
        watch._named(name, Path(source), Path(target))
        return real(source, target, **options)

    return call


def _making(watch: Watch, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        done = real(path, *arguments, **options)
        if Path(path).is_relative_to(watch.root):
            watch._safe[Path(path).stat().st_ino] = (
                frozenset()
            )  # a new directory is empty, even if its inode was used before
        return done

    return call


def _walk(top: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Directories below ``top`` with the names of their entries."""
    for directory, directories, files in os.walk(top):
        yield Path(directory), directories, [*directories, *files]


def _file(path: Path) -> os.stat_result | None:
    inode = path.lstat()
    return inode if stat.S_ISREG(inode.st_mode) else None


def _number(handle: Any) -> int:
    return handle if isinstance(handle, int) else int(handle.fileno())
