"""Arrays that can be made again, kept in files under ``KDCACHE_HOME`` and mapped into memory by every later process.

    <home>/<kind>/<key>.bin     the arrays one after the other, a JSON document that describes them, a sha256 over all
    <home>/<kind>/lock          held by the process that makes one, so that none is made twice at a time

The key is a digest of everything that the arrays depend on, so a file is never wrong, only absent or damaged. A damaged
one is made again. Where no file can be written, the arrays stay in memory. The least recently used files are removed
when there are more than ``LIMIT`` bytes of a kind; whoever has mapped one keeps it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import StorageError
from kdcache.files import Buffer, remove_file, remove_leftovers, write_stream
from kdcache.locks import hold
from kdcache.runs import home

LIMIT = 50_000_000_000  # bytes of the files of a kind
_MAGIC = b"kdcache1"
_END = 8 + len(_MAGIC) + hashlib.sha256().digest_size  # length of the document, magic, sha256
_ALIGNMENT = 64
_BLOCK = 1 << 24  # bytes that are hashed and written together
_LONGEST_DOCUMENT = 1 << 26

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Kept:
    """Arrays by name, and a JSON document beside them. Arrays of a file are read-only views of mapped memory."""

    arrays: Mapping[str, np.ndarray]
    document: Mapping[str, Any]


def kept_or_made(kind: str, key: str, make: Callable[[], Kept]) -> Kept:
    """What ``make`` gives: from a file of an earlier process, or made now and kept.

    Args:
        kind: the directory under the home directory.
        key: a hex digest of all that the arrays depend on.
        make: makes the arrays; what it raises is raised.

    Returns:
        The arrays, mapped from the file; in memory where no file can be kept.
    """
    path = home() / kind / f"{key}.bin"
    found = _mapped(path)
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(path.parent / "lock"))
            remove_leftovers(path.parent)  # of writers that were killed: there is no other one
        except (StorageError, OSError) as error:
            _tell(path.parent, error)
            return make()
        found = _mapped(path)  # another process made it meanwhile
        if found is not None:
            return found
        made = make()
        try:
            _make_room(path.parent, sum(array.nbytes for array in made.arrays.values()))
            write_stream(path, _encoded(made), lambda: None)
        except (StorageError, OSError) as error:
            _tell(path.parent, error)
            return made
        return _mapped(path, known=True) or made


def _encoded(kept: Kept) -> Iterator[Buffer]:
    """The bytes of a file."""
    digest, position, fields = hashlib.sha256(), 0, {}
    for name, array in kept.arrays.items():
        body = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        fields[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "at": position}
        for start in range(0, len(body), _BLOCK):
            digest.update(body[start : start + _BLOCK])
            yield body[start : start + _BLOCK]
        padding = bytes(-len(body) % _ALIGNMENT)
        digest.update(padding)
        yield padding
        position += len(body) + len(padding)
    document = json.dumps({"arrays": fields, "document": kept.document}).encode()
    end = document + len(document).to_bytes(8, "little") + _MAGIC
    digest.update(end)
    yield end + digest.digest()


_found_whole: set[tuple[int, int, int, int]] = set()  # device, inode, size, time of change: hashed by this process


def _mapped(path: Path, *, known: bool = False) -> Kept | None:
    """The arrays of a file; None if it is absent or damaged. ``known``: this process has just written it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(handle)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if status.st_size < _END or not (known or key in _found_whole or _is_whole(handle, status.st_size)):
            return None
        _found_whole.add(key)
        with contextlib.suppress(OSError):  # the time of last use; the time of change stays
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        return _decoded(mmap.mmap(handle, status.st_size, access=mmap.ACCESS_READ))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    finally:
        os.close(handle)


def _is_whole(handle: int, size: int) -> bool:
    """Whether a file ends with the sha256 of all before. The bytes are read and not mapped, so they need no memory."""
    digest, left, block = hashlib.sha256(), size - hashlib.sha256().digest_size, memoryview(bytearray(1 << 20))
    while left:
        count = os.readv(handle, [block[: min(left, len(block))]])
        if not count:
            return False
        digest.update(block[:count])
        left -= count
    return os.read(handle, digest.digest_size) == digest.digest()


def _decoded(data: mmap.mmap) -> Kept:
    """The arrays in the bytes of a file. Raises ValueError, KeyError, TypeError for other bytes."""
    end = len(data) - hashlib.sha256().digest_size
    length = int.from_bytes(data[end - len(_MAGIC) - 8 : end - len(_MAGIC)], "little")
    start = end - len(_MAGIC) - 8 - length
    if data[end - len(_MAGIC) : end] != _MAGIC or start < 0 or length > _LONGEST_DOCUMENT:
        raise ValueError("no document")
    document = json.loads(data[start : start + length])
    arrays = {}
    for name, field in document["arrays"].items():
        dtype, shape, at = _dtype(field["dtype"]), tuple(map(int, field["shape"])), int(field["at"])
        count = math.prod(shape)
        if min(shape, default=0) < 0 or at < 0 or at + count * dtype.itemsize > start:
            raise ValueError(name)
        arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape) if count else np.zeros(shape, dtype)
    return Kept(arrays, document["document"])


def _dtype(name: str) -> np.dtype[Any]:
    """A number of one, two, four or eight bytes, or a bool; nothing else that numpy would take as a dtype."""
    if not re.fullmatch(r"[<|][iuf][1248]|\|b1", name):
        raise ValueError(name)
    return np.dtype(name)


def _make_room(directory: Path, coming: int) -> None:
    """Remove the least recently used files until ``coming`` bytes fit. The caller holds the lock."""
    files = sorted(((path.stat(), path) for path in directory.glob("*.bin")), key=lambda file: file[0].st_atime_ns)
    used = sum(status.st_size for status, _ in files)
    for status, path in files:
        if used + coming <= LIMIT:
            break
        remove_file(path)
        used -= status.st_size


_told: list[str] = []


def _tell(directory: Path, error: Exception) -> None:
    if not _told:
        _told.append(str(error))
        log.warning("nothing can be kept under %s, and it is made anew in every process: %s", directory, error)
