"""What every attack must come to: exit code 3, one line, no file outside the cache touched, no code run, no memory
taken.

An attacker writes manifest and files alike, so digests are made to match: what is tested is what comes after them.
"""

from __future__ import annotations

import hashlib
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.cache.canonical import digest_of
from kdcache.cache.reader import open_cache
from kdcache.errors import DamageError
from kdcache.testing.caches import read_everything
from kdcache.testing.faults import edit_manifest
from tests.cli.commands import kdcache

MOST_MEMORY = 200 << 10  # KiB by which the process may grow
BERT = "teachers/bert"


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.write_text, (self.proof, "code was run"))


def pickled(proof: Path) -> bytes:
    """A pickle that, loaded, leaves ``proof``."""
    return pickle.dumps(Payload(proof))


def put_file(root: Path, name: str, data: bytes) -> None:
    """Put other bytes in the place of a file of a cache, and into its manifest."""
    (root / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()

    def change(document: dict[str, Any]) -> None:
        document["files"][name] = {"bytes": len(data), "sha256": digest}

    edit_manifest(root, change, resign=True)


def signed(document: dict[str, Any]) -> dict[str, Any]:
    """A manifest with identity and checksum as they must be, whatever else it says."""
    document = {key: value for key, value in document.items() if key not in ("identity", "checksum")}
    document["identity"] = digest_of({key: value for key, value in document.items() if key != "provenance"})
    return document | {"checksum": digest_of(document)}


def assert_refused(root: Path, *, by_info: bool = False) -> None:
    """``cache verify`` (and ``info``, where the manifest alone shows it) and a reader refuse it, and nothing else
    happens.
    """
    before, memory = tree(root.parent), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = kdcache("cache", "verify", root)
    assert said.code == 3, said.err
    if by_info:
        said = kdcache("cache", "info", root)
        assert said.code == 3, said.out
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and len(errors[0]) < 2000 and "unexpected" not in errors[0], said.err
    assert "Traceback" not in said.err and "\x1b" not in said.err
    try:
        read_everything(open_cache(root))
    except DamageError as error:
        assert "\n" not in error.message and len(error.message) < 2000
    else:
        raise AssertionError("a reader took it")
    assert tree(root.parent) == before, "something was written"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MOST_MEMORY, "memory was taken"


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Every file below, with size and time."""
    found = {}
    for path in root.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(root))] = (status.st_size, status.st_mtime_ns)
    return found
