from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kdcache import files
from kdcache.dump import run as dump_run
from kdcache.dump.engines.shards import Shard, dump_shard
from kdcache.dump.run import OpenTeacher, open_teacher
from kdcache.dump.stage import DumpReport, dump_teachers, prepare_dump
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe, load_recipe
from kdcache.students.speed import Speed
from kdcache.teachers.backends.torch_backend import TorchBackend
from kdcache.testing.faults import UnsyncedDisk
from kdcache.testing.teachers import make_teachers
from kdcache.testing.tiny import recipe_text, reviews, write_reviews


@dataclass(frozen=True)
class Workbench:
    """A recipe, teachers and a place for a cache, all of this test alone."""

    recipe_file: Path
    teachers: Path
    cache: Path
    opener: OpenTeacher = open_teacher

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(self.recipe_file, list(overrides))

    def dump(self, *overrides: str, repair: bool = False, cache: Path | None = None) -> DumpReport:
        return dump_teachers(
            self.recipe(*overrides),
            self.teachers,
            cache or self.cache,
            progress=SilentProgress(),
            repair=repair,
            opener=self.opener,
        )

    def shard(self, index: int, count: int, *overrides: str, cache: Path | None = None) -> DumpReport:
        """Run one shard of a dump."""
        job = prepare_dump(
            self.recipe(*overrides), self.teachers, cache or self.cache, progress=SilentProgress(), opener=self.opener
        )
        return dump_shard(job, Shard(index, count))

    def only(self, *names: str) -> Workbench:
        """The same with these teachers alone."""
        head, *tables = re.split(r"^(?=\[)", self.recipe_file.read_text(), flags=re.MULTILINE)
        kept = [
            table
            for table in tables
            if not table.startswith("[[teachers]]") or any(f'name = "{name}"' in table for name in names)
        ]
        path = self.cache.parent / f"{'-'.join(names)}.toml"
        path.write_text(re.sub(r'"(\w+\.tsv)"', rf'"{self.recipe_file.parent}/\1"', "".join([head, *kept])))
        return replace(self, recipe_file=path)


def small_bench(directory: Path, teachers: Path) -> Workbench:
    """Two teachers over 12 texts in parts of 2: four full parts, two with logits only."""
    rows = reviews(12, seed=3)
    write_reviews(directory / "train.tsv", rows[:8])
    write_reviews(directory / "dev.tsv", rows[8:])
    recipe = directory / "small.toml"
    sections = """\
[dump]
layers = [2]
dim = 4
part_size = 2
sample_texts = 6
"""
    recipe.write_text(recipe_text("small", {"bert": "none", "roberta": "none"}, sections))
    return Workbench(recipe, teachers, directory / "cache")


@pytest.fixture(scope="session")
def tiny_teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    families = {"bert": "bert", "roberta": "roberta", "xlm": "xlm-roberta"}
    return make_teachers(tmp_path_factory.mktemp("bundle"), families, widths={"roberta": 24}, own_heads=["xlm"])  # type: ignore[arg-type]


@pytest.fixture
def bench(tmp_path: Path, review_recipe: Path, tiny_teachers: Path) -> Workbench:
    """The shared recipe (three teachers, parts of 32 texts) over teachers that the test may change."""
    shutil.copytree(tiny_teachers, tmp_path / "teachers")
    return Workbench(review_recipe, tmp_path / "teachers", tmp_path / "cache")


@pytest.fixture
def forward_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, tuple[int, ...]]]]:
    """How many texts went through which teacher, asked for which layers; those that only time it are not counted."""
    texts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    names: dict[int, str] = {}
    make: Callable[..., None] = TorchBackend.__init__
    run = TorchBackend.run

    def counting_init(self: TorchBackend, teacher: object, **settings: object) -> None:
        make(self, teacher, **settings)
        names[id(self)] = teacher.name  # type: ignore[attr-defined]

    def counting_run(self: TorchBackend, inputs: dict, layers: tuple[int, ...], pooled: bool) -> object:  # type: ignore[type-arg]
        texts[names[id(self)], tuple(layers)] += len(inputs["input_ids"])
        return run(self, inputs, layers, pooled)

    monkeypatch.setattr(TorchBackend, "__init__", counting_init)
    monkeypatch.setattr(TorchBackend, "run", counting_run)
    monkeypatch.setattr(dump_run, "time_forward", lambda *_: Speed("cpu", 1.0, 1.0))
    yield texts


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny_teachers: Path) -> Workbench:
    """``small_bench`` after a dump by one process: what every other way to dump must equal. Not to be changed."""
    bench = small_bench(tmp_path_factory.mktemp("local"), tiny_teachers)
    with files.use_disk(UnsyncedDisk()):
        bench.dump()
    return bench
