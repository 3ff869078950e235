"""The way of millions of rows, with a few: the same caches, trainings and notes, mapped or not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import kept
from kdcache.cache import buckets
from kdcache.cache.layout import MANIFEST
from kdcache.cache.reader import open_cache
from kdcache.cache.text_table import TextTable
from kdcache.cache.verify import verify
from kdcache.data import task
from kdcache.data.task import load_task
from kdcache.distill.setup import Training, prepare
from kdcache.dump.dry_run import estimate_dump
from kdcache.dump.specs import TextScopes, scopes
from kdcache.dump.stage import dump_teachers
from kdcache.errors import MismatchError
from kdcache.loading.cached import CachedBatches
from kdcache.progress import SilentProgress
from kdcache.runs import home
from kdcache.share.push import without_text
from kdcache.testing.tiny import reviews, write_reviews
from tests.conftest import TinyRun
from tests.distill.test_textfree import Listening


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: TinyRun) -> None:
    (tmp_path / "teachers").symlink_to(tiny_run.teachers)  # beside caches that tests make
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kept, "_told", [])


@pytest.fixture
def from_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, everything is large."""

    def mapped() -> None:
        monkeypatch.setattr(task, "LARGE", 10)
        monkeypatch.setattr(buckets, "LARGE", 10)
        monkeypatch.setattr(buckets, "_ROWS", 16)
        monkeypatch.setattr("kdcache.data.reading._BATCH", 20)

    return mapped


def bare_copy(cache: Path, place: Path) -> Path:
    """The cache without its texts."""
    shutil.copytree(cache, place, ignore=lambda here, _: ["text"] if Path(here) == cache else [])
    (place / MANIFEST).write_bytes(without_text(open_cache(cache).manifest).to_bytes())
    return place


def test_a_dump_of_mapped_texts_is_the_same_cache(
    tiny_run: TinyRun, tmp_path: Path, from_here: Callable[[], None]
) -> None:
    recipe = tiny_run.recipe("dump.hidden_transfer=7")

    def dump(place: str, **keys: Any) -> str:
        return dump_teachers(
            tiny_run.recipe(*keys.pop("with_", ["dump.hidden_transfer=7"])), tiny_run.teachers, tmp_path / place,
            progress=SilentProgress(), **keys,
        ).identity  # fmt: skip

    wanted = dump("plain"), dump("plain", with_=[])
    estimate = estimate_dump(recipe, tiny_run.teachers, tmp_path / "none", progress=SilentProgress()).as_dict()
    from_here()
    assert isinstance(load_task(recipe.data).texts, TextTable)
    assert (dump("mapped"), dump("mapped"), dump("mapped", with_=[])) == (wanted[0], wanted[0], wanted[1])
    assert verify(tmp_path / "mapped") == []
    bare = without_text(open_cache(tmp_path / "mapped").manifest).identity
    dump("bare", no_text=True)
    assert dump("bare", with_=[], no_text=True) == bare
    mapped = estimate_dump(recipe, tiny_run.teachers, tmp_path / "none", progress=SilentProgress()).as_dict()
    for document in (estimate, mapped):
        for name in ("free_bytes", "hours", "seconds"):
            document.pop(name, None)
    assert mapped["texts"] == estimate["texts"] and mapped.get("student") == estimate.get("student")


@pytest.mark.parametrize("asked", [0, 7, 24, None])
@pytest.mark.parametrize("stored", [0, 5])
def test_scopes_of_mapped_texts_are_those_of_a_dict(
    asked: int | None, stored: int, tiny_run: TinyRun, from_here: Callable[[], None]
) -> None:
    section = tiny_run.recipe().data
    ids = load_task(section).splits["transfer"].text_ids[-stored:] if stored else np.zeros((0, 16), np.uint8)

    def groups(found: TextScopes) -> list[list[Any]]:
        every = (found.full, found.evaluation, found.transfer, found.logits_only)
        return [*(list(group.items()) for group in every), list(found.trained_on)]

    wanted = groups(scopes(load_task(section), asked, ids))
    from_here()
    assert groups(scopes(load_task(section), asked, ids)) == wanted


@pytest.mark.parametrize("with_text", [True, False])
def test_a_training_from_mapped_data_is_the_same(
    with_text: bool, tiny_run: TinyRun, tmp_path: Path, from_here: Callable[[], None]
) -> None:
    """Notes, the digest in its identity, and every tensor of an epoch."""
    cache = tiny_run.cache if with_text else bare_copy(tiny_run.cache, tmp_path / "bare")

    def prepared() -> tuple[Training, list[str]]:
        progress = Listening()
        return prepare(tiny_run.recipe(), cache, tmp_path / "run", None, progress), progress.notes

    def rows(training: Training) -> list[Any]:
        assert isinstance(training.source, CachedBatches)
        return [
            (batch.text_ids.tolist(), batch.labels, batch.inputs["input_ids"], batch.targets.logits)  # type: ignore[union-attr]
            for batch in training.source.batches(0)
        ]

    plain, notes = prepared()
    wanted = rows(plain)
    from_here()
    for _ in range(2):
        kept._found_whole.clear()
        found, told = prepared()
        assert isinstance(found.data.texts, TextTable) and (home() / "joins").is_dir()
        assert (told, found.joins, found.recipe) == (notes, plain.joins, plain.recipe)
        assert found.data.digest() == plain.data.digest() and found.some_texts() == plain.some_texts()
        for one, other in zip(rows(found), wanted, strict=True):
            assert one[0] == other[0]
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(one[1:], other[1:], strict=True))


def test_how_other_data_join_a_cache_is_counted_the_same(
    tiny_run: TinyRun, tmp_path: Path, from_here: Callable[[], None]
) -> None:
    train = Path(tiny_run.recipe().data.train).read_text(encoding="utf-8").splitlines()
    (tmp_path / "other.tsv").write_text("\n".join([*train[:70], "a new text\t1", "another one\t0", ""]))

    def counted() -> tuple[Any, ...]:
        progress = Listening()
        overrides = [f'data.train="{tmp_path / "other.tsv"}"', 'distill.missing="skip"', "dump.hidden_transfer=4"]
        training = prepare(tiny_run.recipe(*overrides), tiny_run.cache, tmp_path / "run", None, progress)
        with pytest.raises(MismatchError) as refused:
            prepare(tiny_run.recipe(overrides[0]), tiny_run.cache, tmp_path / "run", None, Listening())
        return training.joins, progress.notes, refused.value.message

    wanted = counted()
    assert wanted[0][0].missing == 2 and wanted[0][0].extra > 20
    from_here()
    assert counted() == wanted


def test_texts_that_are_stored_with_logits_only_are_told_of(
    tiny_run: TinyRun, tmp_path: Path, from_here: Callable[[], None]
) -> None:
    dump_teachers(
        tiny_run.recipe("dump.hidden_transfer=9"), tiny_run.teachers, tmp_path / "cache", progress=SilentProgress()
    )

    def notes(*overrides: str) -> list[str]:
        progress = Listening()
        prepare(tiny_run.recipe(*overrides), tmp_path / "cache", tmp_path / "run", None, progress)
        return [note for note in progress.notes if "logits only" in note]

    write_reviews(tmp_path / "foreign.tsv", reviews(9, seed=77))
    foreign = [f'data.transfer=["{tmp_path / "foreign.tsv"}"]', 'distill.missing="skip"']
    assert notes() == ["15 of 24 transfer texts are stored with logits only (dump.hidden_transfer)"]
    assert notes(*foreign) == []
    from_here()
    assert notes() == ["15 of 24 transfer texts are stored with logits only (dump.hidden_transfer)"]
    assert notes(*foreign) == []
