"""The dump on a Ray cluster of two nodes on this machine: workers killed, joining late, to a disk and to a remote."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdcache.cache.manifest import read_manifest
from kdcache.cache.verify import verify
from kdcache.dump.engines.cluster import Target, dump_on_shared_disk, dump_to_remote
from kdcache.dump.engines.ray_actors import RayEngine
from kdcache.dump.stage import DumpJob, prepare_dump
from kdcache.errors import KdcacheError
from kdcache.progress import SilentProgress
from kdcache.share import keys
from kdcache.share.gc import collect
from kdcache.share.intents import LeaseTiming
from kdcache.share.pull import pull
from kdcache.share.refs import history
from kdcache.share.stores.registry import open_remote
from kdcache.testing.s3_server import S3Server
from tests.dump.conftest import Workbench
from tests.dump.slow_worker import MARKS, SlowWorker
from tests.dump.test_stage import digests

CONTEXT = multiprocessing.get_context("spawn")  # a driver of its own: a forked one would share this one's connection
TIMING = LeaseTiming(ttl=4.0, renew=0.5, poll=0.2)


@pytest.fixture(scope="module")
def cluster(seaweedfs: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two raylets with a CPU each. Their environment is that of the workers."""
    marks = tmp_path_factory.mktemp("marks")
    place = tempfile.mkdtemp(prefix="kdray-", dir="/tmp")  # sockets need short paths
    with pytest.MonkeyPatch.context() as environment:
        wanted = {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "RAY_TMPDIR": place,
            "RAY_worker_niceness": "0",  # 15 by default: on a busy machine a worker then needs minutes for its imports
            MARKS: str(marks),
            **seaweedfs.environment(),
        }
        for name, value in wanted.items():
            environment.setenv(name, value)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="ray")
            import ray
            from ray.cluster_utils import Cluster

            head = {"num_cpus": 1, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
            made = _patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
            _patiently(lambda: made.add_node(num_cpus=1))
            ray.init(address=made.address, log_to_driver=False, configure_logging=False, logging_level="ERROR")
            try:
                yield made
            finally:
                ray.shutdown()
                made.shutdown()
                shutil.rmtree(place, ignore_errors=True)


def _patiently(start: Callable[[], Any]) -> Any:
    """A node has 30 seconds to start, a constant of Ray: on a busy machine it is tried again."""
    for _ in range(2):
        with contextlib.suppress(Exception):  # Ray raises this class itself
            return start()
    return start()


@pytest.fixture
def marks(cluster: Any) -> Path:  # noqa: ARG001 - it sets the variable
    """The directory of marks, empty."""
    directory = Path(os.environ[MARKS])
    for mark in directory.iterdir():
        mark.unlink()
    return directory


def _job(local: Workbench, cache: Path) -> DumpJob:
    return prepare_dump(local.recipe(), local.teachers, cache, progress=SilentProgress())


def _until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 280
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def _begun(marks: Path, count: int) -> list[str]:
    """The first marks, once there are ``count``."""
    _until(lambda: len(list(marks.iterdir())) >= count)
    return [mark.name for mark in sorted(marks.iterdir(), key=lambda mark: mark.stat().st_mtime_ns)]


def _records(cache: Path) -> list[Path]:
    return list(cache.glob(".dump/teachers/*/part-*.json"))


def test_a_worker_killed_in_a_part_and_one_that_joins_late_give_the_bytes_of_a_local_dump(
    local: Workbench, cluster: Any, marks: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(1) as driver:
        dump = driver.submit(dump_on_shared_disk, _job(local, cache), RayEngine(worker=SlowWorker))
        os.kill(int(_begun(marks, 1)[0].split("-")[0]), signal.SIGKILL)
        _patiently(lambda: cluster.add_node(num_cpus=1))  # only the main thread may
        report = dump.result()
    ours, theirs = digests(cache), digests(local.cache)
    assert {name: ours[name] == theirs[name] for name in theirs if name not in ("manifest.json", "README.md")} == {
        name: True for name in ours if name not in ("manifest.json", "README.md")
    }
    assert report.identity == read_manifest(local.cache).identity
    assert len({mark.name.split("-")[0] for mark in marks.iterdir()}) >= 3  # two, and one after the kill
    assert not verify(cache)
    assert not list(cache.rglob("*.tmp"))


def _dump_to(bench: Workbench, url: str, address: str | None) -> str:
    target = Target(open_remote(url), url, "reviews", timing=TIMING)
    report, _ = dump_to_remote(_job(bench, bench.cache), RayEngine(address, worker=SlowWorker), target)
    return report.identity


def test_a_dump_to_s3_with_driver_and_worker_killed(
    local: Workbench, cluster: Any, marks: Path, tmp_path: Path, seaweedfs: S3Server
) -> None:
    url = seaweedfs.url()
    remote = seaweedfs.open(url)
    bench = replace(local, cache=tmp_path / "driver" / "cache")
    driver = CONTEXT.Process(target=_dump_to, args=(bench, url, cluster.address))
    driver.start()
    _until(lambda: len(_records(bench.cache)) >= 2)
    assert driver.pid is not None
    os.kill(driver.pid, signal.SIGKILL)
    driver.join()
    assert not history(remote, "reviews")
    before = len(_records(bench.cache))
    ran = {mark.name for mark in marks.iterdir()}

    def disturb() -> None:
        again = next(name for name in _begun(marks, len(ran) + 1) if name not in ran)
        os.kill(int(again.split("-")[0]), signal.SIGKILL)

    thread = threading.Thread(target=disturb)
    thread.start()
    identity = _dump_to(bench, url, None)
    thread.join()
    assert before >= 2  # so the second driver had something to go on from
    assert identity == read_manifest(local.cache).identity
    assert [ref.number for ref in history(remote, "reviews")] == [1]
    assert not list(bench.cache.rglob("*.zarr"))  # hidden states were never here
    pull(remote, "reviews", tmp_path / "pulled")
    assert not verify(tmp_path / "pulled")
    time.sleep(TIMING.ttl + 1)  # the killed driver's intent expires
    collect(remote, grace=0, delete=True, timing=TIMING)
    wanted = {keys.file_key(digest.sha256) for digest in read_manifest(tmp_path / "pulled").contents.files.values()}
    left = {entry.key for entry in remote.list("")}
    assert {key for key in left if key.startswith(keys.FILES)} == wanted
    others = left - wanted - {"probes/clock"}  # by which gc reads the store's clock (docs/decisions/0012)
    assert sorted(key.split("/")[0] for key in others) == ["manifests", "refs"]


@pytest.mark.usefixtures("cluster")
def test_no_room_is_an_error(local: Workbench, tmp_path: Path) -> None:
    with pytest.raises(KdcacheError, match="has no node with 64 CPUs") as caught:
        dump_on_shared_disk(_job(local, tmp_path / "cache"), RayEngine(cpus=64))
    assert "--worker-cpus" in caught.value.hint
