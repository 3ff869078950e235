"""A small made-up cache in a directory of its own, to be turned against its reader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache.files import use_disk
from kdcache.testing.caches import dump, made_plan
from kdcache.testing.faults import UnsyncedDisk


@pytest.fixture(autouse=True)
def _unsynced() -> Iterator[None]:
    with use_disk(UnsyncedDisk()):
        yield


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "inside" / "cache"
    path.parent.mkdir()
    dump(path, made_plan(4, 2, ("bert",)))
    return path
