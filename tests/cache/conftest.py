"""Caches made of hashes, and a disk that does not wait for the hardware: these tests write thousands of small files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdcache.files import use_disk
from kdcache.testing.caches import Plan, dump, made_plan
from kdcache.testing.faults import UnsyncedDisk


@pytest.fixture(scope="module", autouse=True)  # not of the session: other rooms run after this one
def _unsynced() -> Iterator[None]:
    with use_disk(UnsyncedDisk()):
        yield


@pytest.fixture(scope="session")
def memory() -> str | None:
    """A file system in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture
def tmp_path(memory: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=memory, prefix="kdcache-test-") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def plan() -> Plan:
    """Ten train and five test texts in parts of four, two teachers with two layers each."""
    return made_plan()


@pytest.fixture(scope="session")
def pristine(memory: str | None, plan: Plan) -> Iterator[Path]:
    """A finished cache of ``plan``; not to be changed."""
    with tempfile.TemporaryDirectory(dir=memory, prefix="kdcache-test-") as directory:
        path = Path(directory) / "cache"
        dump(path, plan)
        yield path


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy that a test may change."""
    made = iter(range(1000))

    def copy(path: Path) -> Path:
        target = tmp_path / f"copy-{next(made)}"
        shutil.copytree(path, target)
        return target

    return copy
