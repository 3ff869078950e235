"""A dump straight to a remote by one process: same bytes, interrupted and continued, gc in between, refused workers."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from kdcache import files
from kdcache.cache import layout as cache_layout
from kdcache.cache.joint import member
from kdcache.cache.manifest import read_manifest
from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify
from kdcache.dump.engines.cluster import Source, Target, _job, dump_on_shared_disk, dump_to_remote
from kdcache.dump.engines.dispatch import Key
from kdcache.dump.engines.local import LocalEngine
from kdcache.dump.engines.messages import About, Failed, Job, Outcome, Written
from kdcache.dump.engines.worker import Worker
from kdcache.dump.stage import DumpJob, DumpReport, plan_dump, prepare_dump
from kdcache.errors import LockedError, MismatchError, RemoteError, StorageError
from kdcache.progress import SilentProgress
from kdcache.share import keys
from kdcache.share.gc import collect
from kdcache.share.intents import LeaseTiming, hold
from kdcache.share.pull import pull
from kdcache.share.push import PushReport
from kdcache.share.refs import history
from kdcache.share.stores.base import Remote
from kdcache.share.stores.directory import DirectoryRemote
from kdcache.testing.faults import UnsyncedDisk
from tests.dump.conftest import Workbench
from tests.dump.test_stage import digests

TIMING = LeaseTiming(ttl=60.0, poll=0.01, patience=0.05)


@pytest.fixture(autouse=True)
def _fast_disk() -> object:
    with files.use_disk(UnsyncedDisk()):
        yield


@pytest.fixture
def team(tmp_path: Path) -> DirectoryRemote:
    (tmp_path / "team").mkdir()
    return DirectoryRemote(tmp_path / "team")


def _prepared(bench: Workbench, *overrides: str) -> DumpJob:
    return prepare_dump(bench.recipe(*overrides), bench.teachers, bench.cache, progress=SilentProgress())


def _dump(bench: Workbench, team: DirectoryRemote, *overrides: str) -> tuple[DumpReport, PushReport]:
    target = Target(team, team.url, "reviews", timing=TIMING)
    return dump_to_remote(_prepared(bench, *overrides), LocalEngine(), target)


def _files_on(remote: Remote) -> set[str]:
    return {entry.key for entry in remote.list(keys.FILES)}


def test_a_dump_to_a_remote_is_the_local_one_and_leaves_no_hidden_states_here(
    local: Workbench, team: DirectoryRemote, tmp_path: Path
) -> None:
    bench = replace(local, cache=tmp_path / "driver")
    report, pushed = _dump(bench, team)
    assert report.identity == read_manifest(local.cache).identity == pushed.identity
    assert pushed.reference == "reviews@1"
    assert not list(bench.cache.rglob("*.zarr"))
    assert not list((bench.cache / "teachers").glob("*/outputs"))
    pull(team, "reviews", tmp_path / "pulled")
    assert not verify(tmp_path / "pulled")
    assert not verify(bench.cache)  # what is here is whole
    with pytest.raises(MismatchError, match="was pulled in part"):
        open_cache(bench.cache).outputs("bert", "part-00000")
    collect(team, grace=0, delete=True, timing=TIMING)
    contents = read_manifest(bench.cache).contents
    assert _files_on(team) == {keys.file_key(digest.sha256) for digest in contents.files.values()}
    assert not list(team.list(keys.INTENTS))


def test_the_same_command_again_runs_and_sends_nothing(
    local: Workbench, team: DirectoryRemote, tmp_path: Path, forward_passes: Counter[tuple[str, tuple[int, ...]]]
) -> None:
    bench = replace(local, cache=tmp_path / "driver")
    _dump(bench, team)
    forward_passes.clear()
    _, again = _dump(bench, team)
    assert not forward_passes
    assert (again.reference, again.files_sent) == ("reviews@1", 0)


class _Dying(Worker):
    """Fails after some pieces, as if the network had gone."""

    left = 0

    def _run(self, piece: object, bases: Mapping[int, bytes]) -> Written:
        if _Dying.left == 0:
            raise RemoteError("the network is gone")
        _Dying.left -= 1
        return super()._run(piece, bases)  # type: ignore[arg-type]


def test_an_interrupted_dump_goes_on_from_what_arrived(
    local: Workbench,
    team: DirectoryRemote,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forward_passes: Counter[tuple[str, tuple[int, ...]]],
) -> None:
    bench = replace(local, cache=tmp_path / "driver")
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.dump.engines.local.Worker", _Dying)
        _Dying.left = 5
        with pytest.raises(RemoteError, match="the network is gone"):
            _dump(bench, team)
    assert not history(team, "reviews")
    arrived = _files_on(team)
    assert arrived
    forward_passes.clear()
    report, _ = _dump(bench, team)
    assert report.identity == read_manifest(local.cache).identity
    assert arrived <= _files_on(team)
    assert sum(run.parts for run in report.runs) in (12 - 5, 12 - 4)  # one may have been on its way


def test_what_a_gc_took_before_the_dump_went_on_is_dumped_again(
    local: Workbench, team: DirectoryRemote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = replace(local, cache=tmp_path / "driver")
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.dump.engines.local.Worker", _Dying)
        _Dying.left = 5
        with pytest.raises(RemoteError):
            _dump(bench, team)
    collect(team, grace=0, delete=True, timing=TIMING)
    assert not _files_on(team)
    report, _ = _dump(bench, team)
    assert report.identity == read_manifest(local.cache).identity
    pull(team, "reviews", tmp_path / "pulled")
    assert not verify(tmp_path / "pulled")


def test_more_layers_make_a_second_version_that_shares_the_first(
    local: Workbench, team: DirectoryRemote, tmp_path: Path
) -> None:
    bench = replace(local, cache=tmp_path / "driver")
    _dump(bench, team)
    first = _files_on(team)
    report, pushed = _dump(bench, team, "dump.layers=[1, 2]")
    assert pushed.reference == "reviews@2"
    assert first <= _files_on(team)
    assert report.identity == local.dump("dump.layers=[1, 2]", cache=tmp_path / "whole").identity


def test_a_gc_in_progress_is_waited_for_and_one_during_the_dump_is_refused(
    local: Workbench, team: DirectoryRemote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = replace(local, cache=tmp_path / "driver")
    with hold(team, "mark", TIMING), pytest.raises(LockedError, match="a gc is in progress"):
        _dump(bench, team)

    class Collecting(Worker):
        def _run(self, piece: object, bases: Mapping[int, bytes]) -> Written:
            with pytest.raises(LockedError, match="a push is in progress"):
                collect(team, grace=0, delete=True, timing=TIMING)
            return super()._run(piece, bases)  # type: ignore[arg-type]

    monkeypatch.setattr("kdcache.dump.engines.local.Worker", Collecting)
    assert _dump(bench, team)[1].new_version


def test_workers_on_a_shared_disk_write_the_same_bytes(local: Workbench, tmp_path: Path) -> None:
    """As with Ray, with the worker in this process."""
    bench = replace(local, cache=tmp_path / "cache")
    report = dump_on_shared_disk(_prepared(bench), LocalEngine())
    ours, theirs = digests(bench.cache), digests(local.cache)
    apart = {"manifest.json", "README.md"}
    assert {name: data for name, data in ours.items() if name not in apart} == {
        name: data for name, data in theirs.items() if name not in apart
    }
    assert report.identity == read_manifest(local.cache).identity
    assert [run.texts for run in report.runs] == [12, 12]


@pytest.fixture
def shared(local: Workbench, tmp_path: Path) -> Iterator[Job]:
    """What a driver would tell workers on a shared disk; the driver is a member meanwhile."""
    job = _prepared(replace(local, cache=tmp_path / "cache"))
    with member(job.cache_dir) as joint, joint.planning():
        writer = joint.open(job.task_spec, job.settings)
        plan_dump(writer, job)
        (job.cache_dir / cache_layout.STATE / "driver-1").touch()
        yield replace(_job(job, writer), cache_dir=job.cache_dir, token="driver-1")


def _check(job: Job) -> Outcome:
    worker = Worker(job)
    try:
        return worker.check()
    finally:
        worker.close()


def test_a_worker_with_everything_in_place_is_taken(shared: Job) -> None:
    assert isinstance(_check(shared), About)


def test_a_worker_with_another_library_version_is_refused(shared: Job) -> None:
    failed = _check(replace(shared, versions={**shared.versions, "torch": "1.0"}))
    assert isinstance(failed, Failed)
    assert failed.for_good
    error = failed.error("node/7")
    assert isinstance(error, MismatchError)
    assert "worker node/7: it has torch " in error.message
    assert "the driver has 1.0" in error.message


def test_a_worker_that_does_not_share_the_disk_is_refused(shared: Job) -> None:
    failed = _check(replace(shared, token="driver-2"))
    assert isinstance(failed, Failed)
    assert "its disk is not shared" in failed.message
    assert "--to" in failed.hint


def test_a_worker_that_may_not_write_is_refused(shared: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, _: bytes) -> None:
        raise StorageError(f"cannot write '{path}': Permission denied", "Make the place writable.")

    monkeypatch.setattr("kdcache.dump.engines.worker.write_file", refuse)
    failed = _check(shared)
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.for_good) == ("StorageError", True)
    assert "Permission denied" in failed.message


def test_a_worker_without_the_teachers_is_refused(shared: Job, tmp_path: Path) -> None:
    failed = _check(replace(shared, teachers_dir=tmp_path / "nowhere"))
    assert isinstance(failed, Failed)
    assert "no teachers' directory" in failed.message


def test_a_worker_with_another_teacher_is_refused(local: Workbench, tmp_path: Path) -> None:
    """Its fingerprint is compared when the teacher is loaded; the piece is given to somebody else."""
    job = _prepared(replace(local, cache=tmp_path / "cache"))
    with member(job.cache_dir) as joint, joint.planning():
        writer = joint.open(job.task_spec, job.settings)
        missing = plan_dump(writer, job)
        told = replace(_job(job, writer), remote=tempfile.mkdtemp(dir=tmp_path))
        spec = told.teachers["bert"].spec
        other = replace(spec, fingerprints=replace(spec.fingerprints, weights="0" * 64))
        told = replace(told, teachers={"bert": replace(told.teachers["bert"], spec=other)})
        last = missing["bert"][-1].part.name
        failed = Worker(told).do(*Source(writer, missing).message(Key("bert", last)))
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.for_good) == ("MismatchError", True)
    assert "is not the driver's: weights" in failed.message
    assert "instead of 000000000000" in failed.message
