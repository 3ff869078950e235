"""A tiny task with everything that distillation takes: three teachers of three tokenizers and two caches of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdcache.dump.stage import dump_teachers
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe, load_recipe
from kdcache.testing.teachers import make_teachers


@dataclass(frozen=True)
class TinyRun:
    """``cache``: PCA to 8 dimensions in int8, as recipes have it; ``exact``: full width in float32."""

    recipe_file: Path
    teachers: Path
    cache: Path
    exact: Path

    def recipe(self, *overrides: str) -> Recipe:
        """The recipe of the task with changes."""
        return load_recipe(self.recipe_file, list(overrides))


@pytest.fixture(scope="session")
def tiny_run(review_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    root = tmp_path_factory.mktemp("tiny-run")
    teachers = make_teachers(
        root / "teachers", {"bert": "bert", "roberta": "roberta", "xlm": "xlm-roberta"}, widths={"roberta": 24}
    )
    recipe = load_recipe(review_recipe)
    dump_teachers(recipe, teachers, root / "cache", progress=SilentProgress())
    exact = load_recipe(review_recipe, ["dump.projection=none", "dump.dtype=float32"])
    dump_teachers(exact, teachers, root / "exact", progress=SilentProgress())
    return TinyRun(review_recipe, teachers, root / "cache", root / "exact")


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a directory, so that a test may change it."""
    import shutil

    def copy(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / "copied" / directory.name))

    return copy
