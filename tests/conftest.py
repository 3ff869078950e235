"""What all tests share: no network, one thread, a small review task and three tiny teachers of three tokenizers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # before any import reads them
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from threads, and one thread repeats exactly

from kdcache import files
from kdcache.recipe import Recipe, load_recipe
from kdcache.testing.s3_server import (
    rclone_store as rclone_store,
)  # fixtures of real servers, started when first asked for
from kdcache.testing.s3_server import seaweedfs as seaweedfs
from kdcache.testing.tiny import make_model, recipe_text, reviews, write_reviews

# The same examples on every run, and no time limit per example: the first one pays for imports.
settings.register_profile("kdcache", deadline=None, derandomize=True, database=None)
settings.load_profile("kdcache")


def pytest_configure(config: pytest.Config) -> None:
    """Without ``-m cuda`` a GPU is hidden: the other tests compare what a CPU computes."""
    if not str(config.option.markexpr).startswith("cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``cuda`` run with ``-m cuda`` where there is a GPU."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and pytest -m cuda"))


@pytest.fixture(scope="session", autouse=True)
def _home_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is read from or left in the user's home; processes that tests start inherit it."""
    os.environ["KDCACHE_HOME"] = str(tmp_path_factory.mktemp("kdcache-home"))


@pytest.fixture(scope="module", autouse=True)
def _a_real_disk_before_and_after() -> Iterator[None]:
    """Every module starts with system calls that reach the disk, in whatever order a worker is given the modules."""
    assert type(files.disk) is files.Disk
    yield
    assert type(files.disk) is files.Disk


@dataclass(frozen=True)
class ReviewTask:
    """TSV files with the columns ``sentence`` and ``label`` (0, 1).

    The transfer file has no labels. No text is in two files.
    """

    directory: Path
    train: Path  # 96 rows
    validation: Path  # 32 rows
    test: Path  # 32 rows
    transfer: Path  # 24 rows


@pytest.fixture(scope="session")
def review_task(tmp_path_factory: pytest.TempPathFactory) -> ReviewTask:
    directory = tmp_path_factory.mktemp("reviews")
    rows = reviews(184, seed=1)
    return ReviewTask(
        directory,
        train=write_reviews(directory / "train.tsv", rows[:96]),
        validation=write_reviews(directory / "dev.tsv", rows[96:128]),
        test=write_reviews(directory / "test.tsv", rows[128:160]),
        transfer=write_reviews(directory / "more.tsv", rows[160:], labelled=False),
    )


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random encoders with their tokenizers.

    WordPiece 4 x 16, byte-level BPE 4 x 24, Unigram 2 x 16 (blocks x width).
    """
    directory = tmp_path_factory.mktemp("models")
    return {
        "bert": make_model(directory / "bert", "bert", seed=1),
        "roberta": make_model(directory / "roberta", "roberta", width=24, seed=2),
        "xlm": make_model(directory / "xlm", "xlm-roberta", depth=2, seed=3),
    }


@pytest.fixture(scope="session")
def _few_texts_are_timed() -> Iterator[None]:
    """Every distillation times its student and its teachers: on four texts here, since no test looks at the figures."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("kdcache.students.speed._LATENCY_TEXTS", 2)
        monkeypatch.setattr("kdcache.students.speed._THROUGHPUT_TEXTS", 4)
        yield


@pytest.fixture(scope="session")
def review_recipe(review_task: ReviewTask, tiny_models: dict[str, Path], _few_texts_are_timed: None) -> Path:
    """A recipe over the review task with the tiny teachers; copy it with overrides (``load_recipe(path, [...])``)."""
    path = review_task.directory / "reviews.toml"
    sections = """\
[cofinetune]
epochs = 1
batch_size = 16
learning_rate = 1e-3
[dump]
dim = 8
part_size = 32
sample_texts = 64
tokens_per_batch = 512
[student]
init_from = "teacher:bert"
layers = 2
[distill]
epochs = 1
batch_size = 16
learning_rate = 1e-3
window = 2
"""
    every = ("train", "validation", "test", "transfer")
    path.write_text(recipe_text("reviews", tiny_models, sections, files=every))
    return path


@dataclass(frozen=True)
class TinyRun:
    """Three teachers of three tokenizers and two caches of them.

    ``cache``: PCA to 8 dimensions in int8, as recipes have it; ``exact``: full width in float32.
    """

    recipe_file: Path
    teachers: Path
    cache: Path
    exact: Path

    def recipe(self, *overrides: str) -> Recipe:
        """The recipe of the task with changes."""
        return load_recipe(self.recipe_file, list(overrides))


@pytest.fixture(scope="session")
def tiny_run(review_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    from kdcache.dump.stage import dump_teachers
    from kdcache.progress import SilentProgress
    from kdcache.testing.teachers import make_teachers

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

    def copy(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / "copied" / directory.name))

    return copy
