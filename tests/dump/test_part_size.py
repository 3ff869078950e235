"""``dump.part_size`` that nobody chose: by the number of texts in a new cache, as it was in one that exists."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kdcache import files
from kdcache.cache import spec
from kdcache.cache.manifest import read_manifest
from kdcache.cache.reader import open_cache
from kdcache.cache.spec import chosen_part_size
from kdcache.dump.dry_run import estimate_dump
from kdcache.dump.specs import settings_of
from kdcache.dump.stage import prepare_dump
from kdcache.errors import MismatchError, RecipeError
from kdcache.progress import SilentProgress
from kdcache.runs import stage_inputs, student_digest
from kdcache.testing.faults import UnsyncedDisk
from kdcache.testing.tiny import reviews, write_reviews
from tests.dump.conftest import Workbench


@pytest.fixture(autouse=True)
def _fast_disk() -> object:
    with files.use_disk(UnsyncedDisk()):
        yield


@pytest.fixture
def larger_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 12 texts of ``local``, dumped in parts of 2, are now enough for parts of 4."""
    monkeypatch.setattr(spec, "PART_SIZE", 2)
    monkeypatch.setattr(spec, "LARGEST_PART_SIZE", 4)
    monkeypatch.setattr(spec, "_PARTS", 4)


def without_size(bench: Workbench, directory: Path, cache: Path) -> Workbench:
    """The same recipe without ``dump.part_size``, over data of its own."""
    recipe = directory / "small.toml"
    recipe.write_text(bench.recipe_file.read_text().replace("part_size = 2\n", ""))
    for name in ("train.tsv", "dev.tsv"):
        (directory / name).write_bytes((bench.recipe_file.parent / name).read_bytes())
    return replace(bench, recipe_file=recipe, cache=cache)


def identity(cache: Path) -> str:
    return read_manifest(cache).identity


@pytest.mark.parametrize(
    ("texts", "size"),
    [
        (0, 4096),
        (4_194_304, 4096),
        (4_194_305, 8192),
        (8_388_608, 8192),
        (8_388_609, 16384),
        (10**9, 16384),
    ],
)
def test_parts_double_where_there_would_be_more_than_1024(texts: int, size: int) -> None:
    assert chosen_part_size(texts) == size


def test_few_texts_have_the_bytes_of_a_dump_with_the_former_default(local: Workbench, tmp_path: Path) -> None:
    bench = without_size(local, tmp_path, tmp_path / "cache")
    bench.dump()
    assert open_cache(bench.cache).settings.part_size == 4096
    assert identity(bench.cache) == local.dump("dump.part_size=4096", cache=tmp_path / "given").identity


@pytest.mark.usefixtures("larger_from_here")
def test_a_new_cache_is_cut_by_its_number_of_texts(local: Workbench, tmp_path: Path) -> None:
    bench = without_size(local, tmp_path, tmp_path / "cache")
    for index in (1, 0, 2):
        bench.shard(index, 3)
    assert [part.texts for part in open_cache(bench.cache).parts] == [4, 4, 4]
    assert open_cache(bench.cache).settings.part_size == 4
    assert identity(bench.cache) == local.dump("dump.part_size=4", cache=tmp_path / "given").identity


@pytest.mark.usefixtures("larger_from_here")
def test_an_interrupted_dump_goes_on_in_the_parts_that_it_began_with(
    local: Workbench, tmp_path: Path, forward_passes: Counter[tuple[str, tuple[int, ...]]]
) -> None:
    bench = without_size(local, tmp_path, tmp_path / "cache")
    local.dump(cache=tmp_path / "whole")
    once = Counter(forward_passes)
    forward_passes.clear()
    local.shard(0, 2, cache=bench.cache)  # parts of 2, and half of the work; nothing is published
    assert bench.dump().published
    assert identity(bench.cache) == identity(local.cache)
    assert forward_passes == once


@pytest.mark.usefixtures("larger_from_here")
def test_shards_take_the_size_of_the_first_one(local: Workbench, tmp_path: Path) -> None:
    bench = without_size(local, tmp_path, tmp_path / "cache")
    local.shard(1, 2, cache=bench.cache)
    assert bench.shard(0, 2).published
    assert identity(bench.cache) == identity(local.cache)


@pytest.mark.usefixtures("larger_from_here")
def test_a_finished_cache_grows_in_parts_of_its_size(
    local: Workbench, tmp_path: Path, forward_passes: Counter[tuple[str, tuple[int, ...]]]
) -> None:
    bench = without_size(local, tmp_path, tmp_path / "cache")
    local.dump(cache=bench.cache)
    forward_passes.clear()
    assert bench.dump().runs == ()
    rows = reviews(16, seed=3)  # the twelve texts, and four more
    write_reviews(tmp_path / "train.tsv", [*rows[:8], *rows[12:]])
    plan = estimate_dump(bench.recipe(), bench.teachers, bench.cache, progress=SilentProgress())
    assert [teacher.texts for teacher in plan.teachers] == [4, 4]
    forward_passes.clear()
    bench.dump()
    assert open_cache(bench.cache).settings.part_size == 2
    assert [part.texts for part in open_cache(bench.cache).parts] == [2] * 8
    assert set(forward_passes.values()) == {4}
    with pytest.raises(MismatchError, match="part_size 2; now it is 4"):
        bench.dump("dump.part_size=4")


@pytest.mark.usefixtures("larger_from_here")
def test_workers_and_imported_teachers_get_the_same_size(local: Workbench, tmp_path: Path) -> None:
    bench = without_size(local, tmp_path, local.cache)
    job = prepare_dump(bench.recipe(), bench.teachers, local.cache, progress=SilentProgress())
    assert job.settings.part_size == 2  # what every engine sends to its workers
    dump = bench.recipe().dump
    assert settings_of(dump, 12, tmp_path / "new").part_size == 4
    assert settings_of(dump, 12, local.cache).part_size == 2
    assert settings_of(bench.recipe("dump.part_size=3").dump, 12, local.cache).part_size == 3  # refused when opened


def test_a_run_that_was_finished_with_the_former_default_stays_finished(local: Workbench, tmp_path: Path) -> None:
    bench = without_size(local, tmp_path, tmp_path / "cache")
    assert stage_inputs(bench.recipe(), "cache") == stage_inputs(bench.recipe("dump.part_size=4096"), "cache")
    assert stage_inputs(bench.recipe(), "cache")["dump.part_size"] == "4096"
    for stage in ("student", "baseline"):
        assert stage_inputs(bench.recipe(), stage) == stage_inputs(bench.recipe("distill.window=8"), stage)
        assert stage_inputs(bench.recipe(), stage)["distill.window"] == "8"
    assert student_digest(bench.recipe()) == student_digest(bench.recipe("distill.window=8"))


def test_a_cache_with_too_many_files_is_refused_before_a_teacher_runs(
    local: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward_passes: Counter[object]
) -> None:
    files_there = len(read_manifest(local.cache).contents.files)
    monkeypatch.setattr("kdcache.dump.specs.MAX_FILES", files_there - 6)  # without tokenizers, bases and two splits
    local.dump(cache=tmp_path / "fits")
    monkeypatch.setattr("kdcache.dump.specs.MAX_FILES", files_there - 7)
    with pytest.raises(RecipeError, match="in 6 parts of 2 texts; it may have") as caught:
        local.dump(cache=tmp_path / "new")
    assert "dump.part_size = 4" in str(caught.value.hint)
    assert not (tmp_path / "new" / "texts").exists()
    with pytest.raises(RecipeError):
        estimate_dump(local.recipe(), local.teachers, tmp_path / "new", progress=SilentProgress())
    monkeypatch.setattr("kdcache.dump.specs.MAX_PARTS", 5)
    with pytest.raises(RecipeError, match="files in 5 parts"):
        local.dump(cache=tmp_path / "new")
    assert len(forward_passes) == 4  # of the dump that fits: two teachers, with hidden states and without
