"""Small caches, a remote in memory, and a clock that only tests move."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache.files import use_disk
from kdcache.testing.caches import dump, made_plan
from kdcache.testing.faults import UnsyncedDisk
from kdcache.testing.memory_remote import MemoryRemote
from tests.share.worlds import World

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture(scope="module", autouse=True)  # not of the session: other rooms run after this one
def _unsynced() -> Iterator[None]:
    with use_disk(UnsyncedDisk()):
        yield


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="kdcache-test-") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def caches() -> Iterator[dict[str, Path]]:
    """``one``: a teacher; ``two``: the same and another teacher; ``other``: other texts. Not to be changed."""
    plans = {
        "one": made_plan(3, 2, ["bert"]),
        "two": made_plan(3, 2, ["bert", "roberta"]),
        "other": made_plan(5, 2, ["bert"]),
    }
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="kdcache-test-") as directory:
        for name, plan in plans.items():
            dump(Path(directory) / name, plan)
        yield {name: Path(directory) / name for name in plans}


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def remote(world: World) -> MemoryRemote:
    return world.remote
