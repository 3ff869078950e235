"""Death, a full disk and damage at every moment: the next run ends with the identity of an undisturbed one."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from kdcache import files
from kdcache.cache.verify import verify
from kdcache.dump import stage
from kdcache.dump.run import open_teacher
from kdcache.dump.specs import prepare_teachers
from kdcache.errors import StorageError
from kdcache.teachers.bundle import read_bundle
from kdcache.testing.faults import (
    Died,
    UnsyncedDisk,
    counting_disk,
    delete,
    dying_disk,
    empty,
    failing_disk,
    flip_bit,
    truncate,
)
from kdcache.testing.tiny import recipe_text, reviews, write_reviews
from tests.dump.conftest import Workbench


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_teachers: Path) -> Workbench:
    """Two teachers, two full parts of at most 4 texts, one part with logits alone."""
    directory = tmp_path_factory.mktemp("small")
    rows = reviews(9, seed=3)
    write_reviews(directory / "train.tsv", rows[:6])
    write_reviews(directory / "dev.tsv", rows[6:])
    recipe = directory / "small.toml"
    sections = """\
[dump]
layers = [2]
dim = 4
part_size = 4
"""
    recipe.write_text(recipe_text("small", {"bert": "none", "roberta": "none"}, sections))
    return Workbench(recipe, tiny_teachers, directory / "cache")


@pytest.fixture(scope="module")
def identity(small: Workbench) -> str:
    return small.dump().identity


@pytest.fixture(autouse=True)
def _fast_disk() -> object:
    with files.use_disk(UnsyncedDisk()):
        yield


def test_dying_at_every_step_of_the_disk_loses_nothing(
    small: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _loaded_once(small.only("bert"), monkeypatch) as only:
        _dies_at_every_step(only, tmp_path)


def _dies_at_every_step(only: Workbench, tmp_path: Path) -> None:
    with files.use_disk(disk := counting_disk()):
        undisturbed = only.dump(cache=tmp_path / "undisturbed").identity
    kinds = {step.partition(" /")[0] for step in disk.steps}
    assert kinds == {"write", "fsync", "rename", "fsync directory", "make directory", "remove"}
    for step in range(1, len(disk.steps) + 1):
        cache = tmp_path / f"died-at-{step}"
        with files.use_disk(dying_disk(step)), pytest.raises(Died):
            only.dump(cache=cache)
        assert only.dump(cache=cache).identity == undisturbed
        assert not verify(cache)


@contextmanager
def _loaded_once(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    """Loading is most of a tiny dump's time and touches no disk of ours."""
    teachers = prepare_teachers(bench.recipe(), read_bundle(bench.teachers), bench.teachers, 2)
    monkeypatch.setattr(stage, "prepare_teachers", lambda *_: teachers)
    with open_teacher(teachers[0], bench.teachers) as backend:
        yield replace(bench, opener=lambda *_: nullcontext(backend))


def test_a_full_disk_is_named_and_what_was_written_stays(
    small: Workbench, identity: str, tmp_path: Path, forward_passes: Counter[tuple[str, tuple[int, ...]]]
) -> None:
    with files.use_disk(disk := counting_disk()):
        small.dump(cache=tmp_path / "counted")
    names = [step.split("/")[-1] for step in disk.steps]
    last = max(
        place for place, name in enumerate(names) if name == "part-00002.arrow"
    )  # roberta's last part: bert is complete
    cache = tmp_path / "cache"
    with files.use_disk(failing_disk(last)), pytest.raises(StorageError, match="No space left on device") as caught:
        small.dump(cache=cache)
    assert "run the same command again" in caught.value.hint
    forward_passes.clear()
    assert small.dump(cache=cache).identity == identity
    assert {name for name, _ in forward_passes} == {"roberta"}


def test_an_error_of_the_writer_thread_stops_the_teacher(
    small: Workbench, identity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.cache.writer import CacheWriter

    parts: list[str] = []

    def refuse(_: CacheWriter, name: str, *__: object, **___: object) -> int:
        parts.append(name)
        raise StorageError("the disk fell over")

    monkeypatch.setattr(CacheWriter, "write_part", refuse)
    with pytest.raises(StorageError, match="fell over"):
        small.dump(cache=tmp_path / "cache")
    assert parts == ["bert"]
    monkeypatch.undo()
    assert small.dump(cache=tmp_path / "cache").identity == identity


class _DeadlyDisk(UnsyncedDisk):
    """The process is killed from a thread of its own, some time after its ``at``-th file, and before it publishes the
    manifest.
    """

    def __init__(self, at: int, delay: float) -> None:
        self._left, self._delay = at, delay

    def rename(self, source: Path, target: Path) -> None:
        self._left -= 1
        if self._left == 0:
            threading.Thread(target=self._kill).start()
        if target.name == "manifest.json":
            self._kill()
        super().rename(source, target)

    def _kill(self) -> None:
        time.sleep(self._delay)
        os.kill(os.getpid(), signal.SIGKILL)


def _dump_in_child(bench: Workbench, at: int, delay: float) -> None:
    with files.use_disk(_DeadlyDisk(at, delay)):
        bench.dump()


def test_sigkill_at_random_moments_loses_nothing(bench: Workbench, tmp_path: Path) -> None:
    """Children are forked from a server that has the imports done; each writes some more files before it is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["kdcache.dump.stage", "kdcache.teachers.backends.torch_backend", "tests.dump.conftest"]
    )
    with files.use_disk(disk := counting_disk()):
        undisturbed = bench.dump(cache=tmp_path / "undisturbed").identity
    generator = random.Random()
    renamed = sum(step.startswith("rename") for step in disk.steps)
    moments = [generator.randrange(1, renamed // 6) for _ in range(5)]
    print("killed after so many files more:", moments, "of", renamed)  # shown where the test fails
    for moment in moments:
        child = context.Process(target=_dump_in_child, args=(bench, moment, generator.uniform(0, 0.02)))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not (bench.cache / "manifest.json").exists()
    assert bench.dump().identity == undisturbed
    assert not verify(bench.cache)


_DAMAGES: dict[str, Callable[[Path], None]] = {"flip": flip_bit, "cut": truncate, "delete": delete, "empty": empty}
_FILES = [
    "texts/part-00001.arrow",
    "text/part-00000.arrow",
    "teachers/bert/outputs/part-00000.arrow",
    "teachers/bert/tokens/part-00001.arrow",
    "teachers/roberta/hidden/part-00000.zarr/layer-02/c/0/0",
    "teachers/roberta/hidden/part-00001.zarr/layer-02-scale/zarr.json",
    "teachers/bert/basis/layer-02.safetensors",
    "teachers/bert/tokenizer/tokenizer.json",
]


@pytest.mark.parametrize("number", range(len(_FILES)))
def test_repair_dumps_again_what_is_damaged_and_nothing_else(
    small: Workbench, identity: str, tmp_path: Path, number: int, forward_passes: Counter[tuple[str, tuple[int, ...]]]
) -> None:
    cache, name = tmp_path / "cache", _FILES[number]
    small.dump(cache=cache)
    list(_DAMAGES.values())[number % len(_DAMAGES)](cache / name)
    assert [damage.file for damage in verify(cache)] == [name]
    forward_passes.clear()
    report = small.dump(cache=cache, repair=True)
    assert report.identity == identity
    assert not verify(cache)
    teachers = {teacher for teacher, _ in forward_passes}
    needs_a_run = "outputs" in name or "tokens/" in name or name.endswith("c/0/0") or "basis" in name
    assert teachers == ({name.split("/")[1]} if needs_a_run else set())
    if needs_a_run and "basis" not in name:
        assert sum(forward_passes.values()) <= 4


def test_repair_of_damage_in_several_places(small: Workbench, identity: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    small.dump(cache=cache)
    for number, name in enumerate(_FILES):
        list(_DAMAGES.values())[number % len(_DAMAGES)](cache / name)
    for path in (cache / "data").iterdir():
        flip_bit(path)
    assert small.dump(cache=cache, repair=True).identity == identity
    assert not verify(cache)
