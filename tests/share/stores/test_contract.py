"""Every remote keeps the contract: a dictionary, a directory, a real S3 server, and one that ignores conditions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache.files import use_disk
from kdcache.share.stores.base import Remote
from kdcache.share.stores.directory import DirectoryRemote
from kdcache.testing.faults import UnsyncedDisk
from kdcache.testing.memory_remote import MemoryRemote
from kdcache.testing.remote_contract import RemoteContract
from kdcache.testing.s3_server import S3Server


class TestMemory(RemoteContract):
    @pytest.fixture
    def remote(self) -> Remote:
        return MemoryRemote()


class TestMemoryWithoutConditions(RemoteContract):
    decides = False

    @pytest.fixture
    def remote(self) -> Remote:
        return MemoryRemote(conditional=False)


class TestDirectory(RemoteContract):
    @pytest.fixture
    def remote(self, tmp_path: Path) -> Iterator[Remote]:
        root = tmp_path / "remote"
        root.mkdir()
        with use_disk(UnsyncedDisk()):
            yield DirectoryRemote(root)
        assert not list(root.rglob(".*")), "nothing under way is left behind"


class TestSeaweedFS(RemoteContract):
    @pytest.fixture
    def remote(self, seaweedfs: S3Server) -> Remote:
        return seaweedfs.open()


class TestRclone(RemoteContract):
    decides = False
    replaces_in_one_step = False
    lists_what_can_be_read = False

    @pytest.fixture
    def remote(self, rclone_store: S3Server) -> Remote:
        return rclone_store.open()
