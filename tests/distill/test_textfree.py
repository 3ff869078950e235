"""A cache without its texts: the same files, and a student that learns the same from the colleague's own data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdcache.cache.layout import MANIFEST
from kdcache.cache.reader import open_cache
from kdcache.cache.selection import Selection, write_selection
from kdcache.cache.verify import unreferenced, verify
from kdcache.distill.stage import DistillResult, distill
from kdcache.dump.stage import dump_teachers
from kdcache.errors import DataError, MismatchError
from kdcache.loading.data import student_data
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe
from kdcache.share.push import without_text
from kdcache.testing.tiny import reviews, write_reviews
from tests.conftest import TinyRun


class Listening(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def bare(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a push without texts, or a colleague who has no right to them, leaves."""
    path = tmp_path_factory.mktemp("bare") / "cache"
    shutil.copytree(tiny_run.cache, path, ignore=lambda place, _: ["text"] if Path(place) == tiny_run.cache else [])
    (path / MANIFEST).write_bytes(without_text(open_cache(tiny_run.cache).manifest).to_bytes())
    return path


def train(recipe: Recipe, cache: Path, root: Path, progress: SilentProgress | None = None) -> DistillResult:
    return distill(recipe, cache, root, progress=progress or SilentProgress())


def test_a_dump_without_text_is_the_same_cache_as_one_whose_text_was_left_out(
    tiny_run: TinyRun, bare: Path, tmp_path: Path
) -> None:
    whole, free = open_cache(tiny_run.cache).manifest, open_cache(bare).manifest
    assert free.identity != whole.identity
    assert without_text(free) is free
    assert all(whole.contents.files[path] == digest for path, digest in free.contents.files.items())
    report = dump_teachers(
        tiny_run.recipe(), tiny_run.teachers, tmp_path / "cache", progress=SilentProgress(), no_text=True
    )
    assert report.identity == free.identity
    assert verify(tmp_path / "cache") == [] and unreferenced(tmp_path / "cache") == []
    assert not (tmp_path / "cache" / "text").exists()
    again = dump_teachers(tiny_run.recipe(), tiny_run.teachers, tmp_path / "cache", progress=SilentProgress())
    assert again.identity == free.identity and not again.runs


def test_a_student_learns_the_same_from_the_colleagues_own_data(tiny_run: TinyRun, bare: Path, tmp_path: Path) -> None:
    recipe, partial = tiny_run.recipe(f'student.init_from="{tiny_run.teachers / "bert"}"'), tmp_path / "partial"
    shutil.copytree(tiny_run.cache, partial)
    shutil.rmtree(partial / "text")
    write_selection(partial, Selection(None, text=False))
    weights = []
    for name, cache in (("whole", tiny_run.cache), ("bare", bare), ("partial", partial)):
        result = train(recipe, cache, tmp_path / name)
        weights.append(load_file(result.student / "model.safetensors"))
        joined = result.results["joined"]
        assert {split: (one["rows"], one["missing"], one["extra"]) for split, one in joined.items()} == {
            "train": (96, 0, 0), "validation": (32, 0, 0), "test": (32, 0, 0), "transfer": (24, 0, 0),
        }  # fmt: skip
    assert all(torch.equal(weights[0][key], other[key]) for other in weights[1:] for key in weights[0])


def test_rows_that_do_not_join_are_counted_and_named(tiny_run: TinyRun, bare: Path, tmp_path: Path) -> None:
    rows = reviews(184, seed=1)[:94]
    edited = write_reviews(tmp_path / "edited.tsv", [*rows, ("an altogether new line", 1)])
    recipe = tiny_run.recipe(f'data.train="{edited}"', f'student.init_from="{tiny_run.teachers / "bert"}"')
    progress = Listening()
    with pytest.raises(MismatchError, match="lacks 1 of the"):
        train(recipe, bare, tmp_path / "refused", progress)
    assert any(note.startswith("train: 1 of 95 rows") and "'an altogether new line'" in note for note in progress.notes)
    assert any("train: 2 texts of the cache are not in the data" in note for note in progress.notes)
    skipping = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"missing": "skip"})})
    results = train(skipping, bare, tmp_path / "skipped").results
    assert results["skipped_rows"] == 1
    assert (results["joined"]["train"]["missing"], results["joined"]["train"]["extra"]) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "transfer"), [((), 24), (("data.transfer_rows=7",), 7), (("data.transfer=[]",), 0)]
)
def test_a_cache_stands_in_for_the_data_and_says_so(
    tiny_run: TinyRun, tmp_path: Path, changes: tuple[str, ...], transfer: int
) -> None:
    recipe, progress = tiny_run.recipe('data.train="/nowhere/train.tsv"', *changes), Listening()
    result = train(recipe, tiny_run.cache, tmp_path / "run", progress).results
    assert progress.notes[0].startswith("there is no file '/nowhere/train.tsv': the rows are those of cache '")
    assert result["rows"].get("transfer", 0) == transfer
    if transfer == 7:
        own = student_data(tiny_run.recipe("data.transfer_rows=7").data, None).splits["transfer"]
        ids = student_data(recipe.data, open_cache(tiny_run.cache)).splits["transfer"].text_ids
        np.testing.assert_array_equal(ids, own.text_ids[:])


def test_without_the_data_it_is_said_that_they_are_needed(tiny_run: TinyRun, bare: Path, tmp_path: Path) -> None:
    gone = [f'data.{split}="/nowhere/{split}.tsv"' for split in ("train", "validation", "test")]
    recipe = tiny_run.recipe(*gone, "data.transfer=[]", f'student.init_from="{tiny_run.teachers / "bert"}"')
    with pytest.raises(DataError, match="came without its texts, and the data files are missing too") as caught:
        train(recipe, bare, tmp_path / "run")
    assert "rows join by their text" in caught.value.hint


def test_teachers_and_layers_outside_the_selection_are_refused_with_the_cure(
    tiny_run: TinyRun, tmp_path: Path, copied: Callable[[Path], Path]
) -> None:
    cache = copied(tiny_run.cache)
    shutil.rmtree(cache / "teachers" / "roberta")
    shutil.rmtree(cache / "teachers" / "xlm" / "hidden")
    write_selection(cache, Selection({"bert": (2, 4), "xlm": ()}), origin="reviews@1")
    own = f'student.init_from="{tiny_run.teachers / "bert"}"'
    with pytest.raises(MismatchError, match="teacher 'roberta' was not pulled") as caught:
        train(tiny_run.recipe(own, "distill.method=kd"), cache, tmp_path / "all")
    assert "kdcache cache pull reviews@1 --teachers roberta --no-hidden" in caught.value.hint
    with pytest.raises(MismatchError, match=r"layer 2 of teacher 'xlm' was not pulled|hidden states of teacher 'xlm'"):
        train(tiny_run.recipe(own, 'distill.teachers=["bert", "xlm"]'), cache, tmp_path / "layers")
    result = train(
        tiny_run.recipe(own, 'distill.teachers=["bert", "xlm"]', "distill.method=kd"), cache, tmp_path / "within"
    )
    assert list(result.results["teachers"]) == ["bert", "xlm"]
