"""Distilling from a name.

The same student, its first step before the last file, and a lost connection that costs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.cache.layout import layer_files
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.verify import to_come, verify
from kdcache.distill.stage import DistillResult, distill
from kdcache.errors import RemoteError
from kdcache.loading.examples import join_examples
from kdcache.loading.order import epoch_order
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe
from kdcache.share.keys import parse_file_key
from kdcache.share.local_store import LocalStore
from kdcache.share.push import push
from kdcache.share.reading_through import read_through
from kdcache.share.refs import resolve
from kdcache.share.stores.registry import open_remote
from kdcache.testing.memory_remote import MemoryRemote
from tests.conftest import TinyRun

WINDOW = 1


class HoldingRemote(MemoryRemote):
    """Keeps the files of some digests back until they are let go; may then say that the connection is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.held: set[str] = set()
        self.let_go = threading.Event()
        self.broken = False
        self.handed_out: list[str] = []

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        sha = parse_file_key(key)
        if sha in self.held and not self.let_go.wait(60):
            raise RemoteError("training waited for a file that it did not need yet")
        if self.broken:
            raise RemoteError("the connection is lost")
        self.handed_out += [sha] if sha else []
        return super().read(key, start=start, length=length)


class AtStep(SilentProgress):
    """Calls ``action`` when a step of the training is done."""

    def __init__(self, step: int, action: Any) -> None:
        self.steps, self._step, self._action, self.notes = 0, step, action, list[str]()

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:  # noqa: ARG002
        if "loss" in values:
            self.steps += count
            if self.steps == self._step:
                self._action()

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def remote(tiny_run: TinyRun) -> HoldingRemote:
    remote = HoldingRemote()
    push(remote, tiny_run.cache, "reviews-3t")
    return remote


@pytest.fixture(scope="module")
def recipe(tiny_run: TinyRun) -> Recipe:
    own = f'student.init_from="{tiny_run.teachers / "bert"}"'
    return tiny_run.recipe(
        own, f"distill.window={WINDOW}", "distill.checkpoint_steps=2", 'distill.teachers=["roberta", "bert"]'
    )


@pytest.fixture(scope="module")
def local(tiny_run: TinyRun, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    return distill(recipe, tiny_run.cache, tmp_path_factory.mktemp("local"), progress=SilentProgress())


def from_name(
    remote: MemoryRemote, recipe: Recipe, home: Path, progress: SilentProgress | None = None
) -> DistillResult:
    progress = progress or SilentProgress()
    store = LocalStore(home / "store")
    with read_through(remote, resolve(remote, "reviews-3t"), store=store, progress=progress) as cache:
        return distill(recipe, cache, home / "run", progress=progress)


def same(one: DistillResult, other: DistillResult) -> bool:
    a, b = (load_file(result.student / "model.safetensors") for result in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def last_part_of_the_epoch(cache: Cache) -> set[str]:
    """Digests of hidden states that the first step does not need."""
    parts = join_examples(cache, cache.examples, ("train", "transfer")).parts
    last = cache.parts[parts[epoch_order(parts, seed=0, epoch=0, window=WINDOW)[-1]]].name
    files = cache.manifest.contents.files
    paths = layer_files("bert", last, 4, cache.teachers["bert"].layers[4], cache.token_count("bert", last))
    return {files[path].sha256 for path in paths if not path.endswith("zarr.json")}


def test_a_student_of_a_name_is_that_of_the_directory_and_starts_before_all_has_arrived(
    tiny_run: TinyRun, remote: HoldingRemote, recipe: Recipe, local: DistillResult, tmp_path: Path
) -> None:
    remote.held = last_part_of_the_epoch(open_cache(tiny_run.cache))
    arrived: list[int] = []
    progress = AtStep(1, lambda: (arrived.append(len(remote.held & set(remote.handed_out))), remote.let_go.set()))
    result = from_name(remote, recipe, tmp_path, progress)
    assert arrived == [0], "the first step waited for the last part"
    assert same(result, local)
    assert any("are fetched while the student trains" in note for note in progress.notes)
    place = next((tmp_path / "store" / "caches").iterdir())
    contents = open_cache(place).manifest.contents
    assert verify(place) == [] and to_come(place) == []
    assert not (place / "teachers" / "xlm").exists(), "a teacher that the recipe does not use"
    remote.handed_out.clear()
    again = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"seed": 1})})
    (tmp_path / "run").rename(tmp_path / "first")
    from_name(remote, again, tmp_path)
    assert remote.handed_out == []
    other = recipe.model_copy(
        update={"distill": recipe.distill.model_copy(update={"teachers": ["xlm"], "method": "kd"})}
    )
    (tmp_path / "run").rename(tmp_path / "second")
    from_name(remote, other, tmp_path)
    xlm = {
        digest.sha256
        for path, digest in contents.files.items()
        if path.startswith(("teachers/xlm/outputs", "teachers/xlm/tokenizer"))
    }
    assert set(remote.handed_out) == xlm


def test_a_lost_connection_is_said_and_the_same_command_goes_on_from_its_checkpoint(
    tiny_run: TinyRun, remote: HoldingRemote, recipe: Recipe, local: DistillResult, tmp_path: Path
) -> None:
    remote.held = last_part_of_the_epoch(open_cache(tiny_run.cache))

    def lose() -> None:
        remote.broken = True
        remote.let_go.set()

    with pytest.raises(RemoteError, match="the connection is lost") as caught:
        from_name(remote, recipe, tmp_path, AtStep(3, lose))
    assert "Run the same command again: it continues from its checkpoint" in caught.value.hint
    place = next((tmp_path / "store" / "caches").iterdir())
    assert verify(place) == [] and to_come(place)
    had, remote.broken = set(remote.handed_out), False
    remote.handed_out.clear()
    progress = AtStep(100, None)
    assert same(from_name(remote, recipe, tmp_path, progress), local)
    assert 0 < progress.steps < 8 and any("resumed at step" in note for note in progress.notes)
    assert not had & set(remote.handed_out), "what had arrived was fetched again"


def test_the_command_takes_a_name(
    tiny_run: TinyRun, local: DistillResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.cli.commands import kdcache

    settings = [
        f'student.init_from="{tiny_run.teachers / "bert"}"',
        "distill.window=1",
        'distill.teachers=["roberta", "bert"]',
    ]
    call = [
        "distill",
        tiny_run.recipe_file,
        "--output-dir",
        tmp_path / "runs",
        *(part for one in settings for part in ("--set", one)),
    ]
    monkeypatch.delenv("KDCACHE_REMOTE", raising=False)
    said = kdcache(*call, "--cache", "reviews-3t")
    assert said.code == 2
    assert "no directory 'reviews-3t', and KDCACHE_REMOTE is not set to look for a cache of that name" in said.err
    (tmp_path / "remote").mkdir()
    monkeypatch.setenv("KDCACHE_REMOTE", str(tmp_path / "remote"))
    said = kdcache(*call, "--cache", "reviews-3t")
    assert said.code == 4 and "there is no cache 'reviews-3t'" in said.err
    push(open_remote(str(tmp_path / "remote")), tiny_run.cache, "reviews-3t")
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    said = kdcache(*call, "--cache", "reviews-3t@1", "--json")
    assert said.code == 0, said.err
    assert said.document["cache_identity"] == local.results["cache_identity"]
    assert said.document["scores"] == local.results["scores"]
    assert (tmp_path / "home/store/caches" / local.results["cache_identity"] / "manifest.json").is_file()
    again = kdcache(*call, "--cache", "reviews-3t", "--json")
    assert again.code == 0 and "skipped" in again.err
    said = kdcache("cache", "verify", tmp_path / "home/store/caches" / local.results["cache_identity"])
    assert said.code == 0 and "every selected file" in said.out
