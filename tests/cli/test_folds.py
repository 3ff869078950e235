"""Out-of-fold teachers through the program: train, dump, look, audit, distil."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache import files
from kdcache.testing.faults import UnsyncedDisk
from kdcache.testing.tiny import make_model, recipe_text, reviews, write_reviews
from tests.cli.commands import kdcache


@pytest.fixture(autouse=True)
def _fast_disk() -> Iterator[None]:
    with files.use_disk(UnsyncedDisk()):
        yield


def _recipe(place: Path) -> Path:
    rows = reviews(32, seed=3)
    write_reviews(place / "train.tsv", rows[:24])
    write_reviews(place / "dev.tsv", rows[24:])
    model = make_model(place / "model", "bert", depth=1, seed=1)
    sections = """\
[cofinetune]
epochs = 1
batch_size = 16
[dump]
layers = [1]
dim = 4
part_size = 16
sample_texts = 16
[student]
init_from = "teacher:bert"
[distill]
epochs = 1
batch_size = 16
"""
    (place / "small.toml").write_text(recipe_text("small", {"bert": model}, sections))
    return place / "small.toml"


def test_from_the_folds_to_the_student(tmp_path: Path, _few_texts_are_timed: None) -> None:
    recipe, runs = _recipe(tmp_path), ("--output-dir", tmp_path / "runs")
    said = kdcache("cofinetune", recipe, "--folds", 2, *runs)
    assert said.code == 0, said.err
    assert "2 folds, scores on the 24 labelled train rows:" in said.out
    assert "out of fold: accuracy" in said.out
    document = kdcache("cofinetune", recipe, *runs, "--json").document
    assert document["folds"]["teachers"]["bert"]["texts"] == 24
    said = kdcache("dump-teachers", recipe, *runs)
    assert said.code == 0, said.err
    assert "the logits of 24 train texts come from 2 bundles that did not see them" in said.err
    cache = tmp_path / "runs" / "small" / "cache"
    said = kdcache("cache", "info", cache)
    assert "bert: the logits of 24 train texts come from 2 bundles" in said.out
    assert "On labelled train rows: accuracy 0." in said.out
    assert kdcache("audit", cache).code == 0
    for live in ((), ("--live-teachers", tmp_path / "runs" / "small" / "teachers", "--set", 'name="live"')):
        said = kdcache("distill", recipe, "--cache", cache, *live, *runs)
        assert said.code == 0, said.err
    said = kdcache("dump-teachers", recipe, *runs, "--set", "dump.out_of_fold=false")
    assert said.code == 4
    assert "now they come from the teacher itself" in said.err


@pytest.mark.parametrize("folds", [1, 101])
def test_numbers_of_folds_that_make_no_sense(folds: int, tmp_path: Path) -> None:
    assert kdcache("cofinetune", tmp_path / "none.toml", "--folds", folds).code == 2
