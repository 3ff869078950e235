"""Nothing that a finished step wrote is lost in a power cut, and nothing gets its name before what it stands for is on
the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcache.cache.selection import Selection
from kdcache.codecs.base import LayerSpec
from kdcache.files import (
    Disk,
    DurableFile,
    create_file,
    publish_directory,
    replace_file,
    share_file,
    sync_tree,
    use_disk,
    write_file,
    write_stream,
)
from kdcache.progress import SilentProgress
from kdcache.runs import RunDirectory, mark_finished
from kdcache.share.local_store import LocalStore
from kdcache.share.pull import pull
from kdcache.share.push import push
from kdcache.share.reading_through import read_through
from kdcache.share.refs import resolve
from kdcache.share.stores.directory import DirectoryRemote
from kdcache.testing.caches import LAYERS, Plan, dump, made_plan, made_teacher, made_texts
from kdcache.testing.memory_remote import MemoryRemote
from kdcache.testing.power_cut import watched
from kdcache.training.checkpoints import save
from kdcache.training.loop import train
from kdcache.training.metrics_log import MetricsLog
from kdcache.training.settings import LoopSettings

SMALL = made_plan(3, 2, ["bert"])
GROWN = Plan(
    SMALL.train | made_texts(2, "more"),
    SMALL.test,
    (made_teacher("bert", {**LAYERS, 3: LayerSpec("random", 2, "float16")}), made_teacher("electra")),
)
LOCKS = ("*.lock", "*/lock", "locks", "locks/*", "*/locks", "*/locks/*")


@pytest.fixture(autouse=True)
def _a_real_disk() -> Iterator[None]:
    with use_disk(Disk()):
        yield


def test_every_way_of_writing_a_file(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with watched(tmp_path) as watch:
        write_file(tmp_path / "new/deep/file", b"content")
        assert watch.lost() == []
        write_file(tmp_path / "old", [b"new", b"er"])
        assert watch.lost() == []
        write_stream(tmp_path / "streamed", iter([b"a", b"b"]), lambda: None)
        assert watch.lost() == []
        assert create_file(tmp_path / "created", b"once") and not create_file(tmp_path / "created", b"twice")
        assert watch.lost() == []
        share_file(tmp_path / "created", tmp_path / "other/shared")
        assert watch.lost() == []
        (tmp_path / ".model.tmp").mkdir()
        with DurableFile(tmp_path / ".model.tmp/weights") as file:
            file.write(b"weights")
        sync_tree(tmp_path / ".model.tmp")
        publish_directory(tmp_path / ".model.tmp", tmp_path / "model")
        assert watch.lost() == []
    assert watch.wrong == [] and watch.lost() == []


@pytest.mark.parametrize("forgotten", ["fsync", "fsync_directory"])
def test_a_forgotten_step_is_seen(forgotten: str, tmp_path: Path) -> None:
    disk = Disk()
    setattr(disk, forgotten, lambda _: None)
    with watched(tmp_path) as watch, use_disk(disk):
        write_file(tmp_path / "directory/file", b"content")
    assert watch.lost()
    assert bool(watch.wrong) and (forgotten == "fsync") == any("its bytes were safe" in one for one in watch.wrong)


def test_a_name_that_comes_too_early_is_seen(tmp_path: Path) -> None:
    with watched(tmp_path) as watch:
        (tmp_path / "made").write_bytes(b"content")
        (tmp_path / "made").rename(tmp_path / "file")
        for path in (tmp_path / "file", tmp_path):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    assert watch.lost() == []
    assert watch.wrong and all(one.startswith("file got its name before") for one in watch.wrong)


def test_a_cache_that_is_dumped_and_grows(tmp_path: Path) -> None:
    with watched(tmp_path, unsafe=LOCKS) as watch:
        for plan in (SMALL, GROWN):
            dump(tmp_path / "cache", plan)
            assert watch.lost() == []
    assert watch.wrong == []
    named = [
        path
        for call, path in watch.calls
        if call in ("rename", "replace") and path.startswith("cache/") and ".dump" not in path
    ]
    assert len(named) > 60 and named[-1] == "cache/manifest.json"


def test_a_cache_that_travels(tmp_path: Path) -> None:
    dump(tmp_path / "cache", GROWN)
    (tmp_path / "team").mkdir()
    with watched(tmp_path, unsafe=LOCKS) as watch:
        remote = DirectoryRemote(tmp_path / "team")
        push(remote, tmp_path / "cache", "sst2", workers=1)
        assert watch.lost() == []
        pull(remote, "sst2", tmp_path / "pulled", Selection({"bert": (2,)}), workers=1)
        assert watch.lost() == []
        pull(remote, "sst2", tmp_path / "pulled", workers=1)
    assert watch.wrong == [] and watch.lost() == []


def test_a_local_store(tmp_path: Path) -> None:
    """Files arrive in threads of their own, so the order over all files is not looked at."""
    remote = MemoryRemote()
    dump(tmp_path / "cache", GROWN)
    push(remote, tmp_path / "cache", "sst2")
    with watched(tmp_path, unsafe=LOCKS) as watch:
        store = LocalStore(tmp_path / "store")
        with read_through(remote, resolve(remote, "sst2"), store=store) as cache:
            cache.select(Selection())
        assert watch.lost() == []
        other = LocalStore(tmp_path / "other")
        other.adopt(tmp_path / "cache", cache.manifest)
        assert watch.lost() == []
    assert not [one for one in watch.wrong if "its bytes were safe" in one]


class Line:
    """A line through three points."""

    steps_per_epoch = 3

    def __init__(self) -> None:
        self.model: nn.Module = nn.Linear(1, 1)

    def batches(self, epoch: int, first_step: int) -> Iterator[Any]:  # noqa: ARG002
        yield from torch.arange(3.0)[first_step:].reshape(-1, 1)

    def losses(self, batch: Tensor) -> Iterator[tuple[Tensor, Mapping[str, float | Tensor]]]:
        yield (self.model(batch) - 1).square().sum(), {}

    def evaluate(self, epoch: int) -> dict[str, float]:
        return {"score": float(epoch)}

    def keep_best(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Nothing: a line is not worth keeping."""

    def settle_best(self, epoch: int) -> None:
        """Nothing, as above."""


def test_a_run_directory(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs/reviews")
    with watched(tmp_path, unsafe=LOCKS) as watch:
        run.create()
        replace_file(run.recipe_file, b'name = "reviews"\n')
        assert watch.lost() == []
        line, log = Line(), MetricsLog(run.metrics, "toy")
        line.keep_best = lambda epoch, _: save(run.checkpoints / "best", line.model.state_dict(), step=epoch)  # type: ignore[method-assign,assignment]
        settings = LoopSettings(epochs=2, learning_rate=0.1, checkpoint_steps=2, log_steps=1)
        for _ in range(2):  # the second one resumes, and cuts its log
            train(line, settings, checkpoints=run.checkpoints / "toy", progress=SilentProgress(), on_metrics=log)
            assert watch.lost() == []
        write_file(run.results, json.dumps({"score": 1.0}).encode())
        mark_finished(run, "student", {"key": "value"}, 1.0)
        assert watch.lost() == []
    assert watch.wrong == []
    assert [path for call, path in watch.calls if call == "replace"][-1] == "runs/reviews/run.json"
