"""Shards of one dump on a shared disk: any order, twice, at the same time, killed; always the bytes of a local dump."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdcache import files
from kdcache.cache.joint import SupersededError, member
from kdcache.cache.manifest import read_manifest
from kdcache.cache.opening import hold_lock
from kdcache.cache.reader import open_cache
from kdcache.cache.tokens import Outputs
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter, Part, PartTask
from kdcache.dump import run as dump_run
from kdcache.dump.engines.shards import Shard, parse_shard
from kdcache.dump.run import open_teacher
from kdcache.dump.specs import PreparedTeacher
from kdcache.dump.stage import plan_dump, prepare_dump
from kdcache.errors import LockedError, MismatchError, RecipeError
from kdcache.progress import SilentProgress
from kdcache.teachers.backends import TeacherBackend
from kdcache.testing.faults import UnsyncedDisk
from tests.dump.conftest import Workbench
from tests.dump.test_stage import EXACT, digests

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["kdcache.dump.engines.shards", "kdcache.teachers.backends.torch_backend", __name__])


@pytest.fixture(autouse=True)
def _fast_disk() -> object:
    with files.use_disk(UnsyncedDisk()):
        yield


def _same(cache: Path, local: Workbench) -> bool:
    """Whether both caches have the same files, but for the provenance."""
    ours, theirs = digests(cache), digests(local.cache)
    apart = {"manifest.json", "README.md"}
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and name not in apart] == []
    return read_manifest(cache).identity == read_manifest(local.cache).identity


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 1, 0, 2)])
def test_shards_in_any_order_one_of_them_twice(local: Workbench, tmp_path: Path, order: tuple[int, ...]) -> None:
    reports = [local.shard(index, 3, cache=tmp_path / "cache") for index in order]
    assert [report.published for report in reports] == [*[False] * (len(order) - 1), True]
    assert [report.missing for report in reports][-2:] != [0, 0]
    assert _same(tmp_path / "cache", local)
    assert not verify(tmp_path / "cache")


def test_each_piece_runs_once_and_bases_are_fitted_once(
    local: Workbench, tmp_path: Path, forward_passes: Counter[tuple[str, tuple[int, ...]]]
) -> None:
    local.dump(cache=tmp_path / "one")
    once = Counter(forward_passes)
    forward_passes.clear()
    for index in range(4):
        local.shard(index, 4, cache=tmp_path / "four")
    assert forward_passes == once


def test_a_shard_that_is_run_again_after_the_end_changes_nothing(
    local: Workbench, tmp_path: Path, forward_passes: Counter[tuple[str, tuple[int, ...]]]
) -> None:
    for index in range(2):
        local.shard(index, 2, cache=tmp_path / "cache")
    before = digests(tmp_path / "cache")
    forward_passes.clear()
    report = local.shard(1, 2, cache=tmp_path / "cache")
    assert report.published
    assert not forward_passes
    assert digests(tmp_path / "cache") == before


def test_the_texts_of_a_killed_shard_are_counted_once(
    local: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> dict[str, str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dump_run, "measured_record", killed)
        local.shard(0, 2, cache=tmp_path / "cache")
    for index in (0, 1):
        local.shard(index, 2, cache=tmp_path / "cache")
    found, expected = (read_manifest(one).provenance["teachers"] for one in (tmp_path / "cache", local.cache))
    assert {name: one["texts_run"] for name, one in found.items()} == dict.fromkeys(expected, 12)
    assert {name: one["texts_run"] for name, one in expected.items()} == dict.fromkeys(expected, 12)


def test_a_dump_without_shard_runs_what_is_missing_and_publishes(local: Workbench, tmp_path: Path) -> None:
    local.shard(1, 3, cache=tmp_path / "cache")
    assert not (tmp_path / "cache" / "manifest.json").exists()
    local.dump(cache=tmp_path / "cache")
    assert _same(tmp_path / "cache", local)


def test_shards_extend_a_published_cache(local: Workbench, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    local.dump("dump.layers=[2]", cache=cache)
    for index in (1, 0):
        local.shard(index, 2, "dump.layers=[1, 2]", cache=cache)
    assert read_manifest(cache).identity == local.dump("dump.layers=[1, 2]", cache=tmp_path / "whole").identity


def _shard_in_child(bench: Workbench, index: int, count: int) -> None:
    with files.use_disk(UnsyncedDisk()):
        bench.shard(index, count)


def test_shards_at_the_same_time_with_twins_and_a_kill(local: Workbench, tmp_path: Path) -> None:
    """Four processes on one directory, two of them the same shard; one is killed on its way and started again."""
    bench = replace(local, cache=tmp_path / "cache")
    children = [CONTEXT.Process(target=_shard_in_child, args=(bench, index, 3)) for index in (0, 1, 2, 1)]
    for child in children:
        child.start()
    _wait_for_a_record(bench.cache)
    assert children[0].pid is not None
    os.kill(children[0].pid, signal.SIGKILL)
    for child in children:
        child.join()
    assert [child.exitcode for child in children[1:]] == [0, 0, 0]
    bench.shard(0, 3)
    assert _same(bench.cache, local)
    assert not verify(bench.cache)
    assert not [path for path in bench.cache.rglob("*.tmp") if ".dump" not in path.parts]


def _wait_for_a_record(cache: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and not list(cache.glob(".dump/teachers/*/part-*.json")):
        time.sleep(0.005)


def test_a_shard_whose_twins_publish_meanwhile_changes_nothing(local: Workbench, tmp_path: Path) -> None:
    """The twins run the same parts with other batches, so with other rounding, while this shard loads its teacher."""
    cache = tmp_path / "cache"
    late = _Late(local, cache)
    report = replace(local, opener=late.open).shard(0, 1, *EXACT, "dump.tokens_per_batch=64", cache=cache)
    assert report.published
    assert not verify(cache)
    assert read_manifest(cache).identity == local.dump(*EXACT, cache=tmp_path / "local").identity


class _Late:
    """Loads its first teacher only when the shards 0/2 and 1/2 have published the cache."""

    def __init__(self, bench: Workbench, cache: Path) -> None:
        self._bench, self._cache, self._first = bench, cache, True

    def open(self, teacher: PreparedTeacher, teachers_dir: Path) -> AbstractContextManager[TeacherBackend]:
        if self._first:
            self._first = False
            for index in range(2):
                self._bench.shard(index, 2, *EXACT, cache=self._cache)
        return open_teacher(teacher, teachers_dir)


def test_a_member_with_old_knowledge_writes_nothing_into_a_committed_part(local: Workbench, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    job = prepare_dump(local.recipe(), local.teachers, cache, progress=SilentProgress())
    with member(cache) as joint:
        with joint.planning():
            late = joint.open(job.task_spec, job.settings)
            tasks = {name: task for name, (task, *_) in plan_dump(late, job).items()}
        local.shard(0, 2, cache=cache)
        committed = digests(cache)
        assert _write_zeros(late, "bert", tasks["bert"].part) == 0
        assert digests(cache) == committed
        local.shard(1, 2, cache=cache)
        published = digests(cache)
        with pytest.raises(SupersededError, match="published by another process"):
            _write_zeros(late, "roberta", tasks["roberta"].part)
        assert digests(cache) == published
    assert not verify(cache)


def _write_zeros(writer: CacheWriter, teacher: str, part: Part) -> int:
    outputs = Outputs(np.zeros((len(part.text_ids), 2), np.float32), None)
    return writer.write_part(teacher, part, outputs=outputs, tokens=None, hidden={})


def test_a_plain_dump_and_shards_exclude_each_other(local: Workbench, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with member(cache), pytest.raises(LockedError, match=f"is being written by process {os.getpid()}"):
        local.dump(cache=cache)
    with hold_lock(cache), pytest.raises(LockedError, match="does not share the work"):
        local.shard(0, 2, cache=cache)


def test_shards_of_another_recipe_are_refused(local: Workbench, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    local.shard(0, 2, cache=cache)
    before = digests(cache)
    with pytest.raises(MismatchError, match="part_size"):
        local.shard(1, 2, "dump.part_size=3", cache=cache)
    with pytest.raises(MismatchError, match="max_length"):
        local.shard(1, 2, "data.max_length=16", cache=cache)
    assert digests(cache) == before
    assert local.shard(1, 2, cache=cache).published


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "1/0", "", "1/2/3", "0/9999999"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected i/n"):
        parse_shard(text)


def test_every_piece_is_in_exactly_one_shard(local: Workbench) -> None:
    parts = open_cache(local.cache).parts
    tasks = [PartTask(Part(part.name, part.scope, np.zeros((1, 16), np.uint8)), True, ()) for part in parts]
    for count in (1, 2, 5, 40):
        for teacher in range(2):
            own = [task.part.name for index in range(count) for task in Shard(index, count).own(tasks, teacher)]
            assert sorted(own) == [part.name for part in parts]
    assert parse_shard(" 2/3 ") == Shard(2, 3)
