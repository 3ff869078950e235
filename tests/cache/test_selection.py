"""A part of a cache: it opens, verifies and reads what was selected, and refuses the rest by name, with the cure."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.cache import layout
from kdcache.cache.reader import open_cache
from kdcache.cache.selection import (
    SELECTION,
    LocalSelection,
    Selection,
    choose,
    read_local,
    union,
    write_selection,
)
from kdcache.cache.verify import to_come, unreferenced, verify
from kdcache.errors import DamageError, MismatchError
from kdcache.testing.faults import delete

Copy = Callable[[Path], Path]
LOGITS = Selection({"bert": ()}, text=False)
LAYER = Selection({"bert": (2,)})


def part_of(pristine: Path, target: Path, selection: Selection, **said: object) -> Path:
    """What a partial pull leaves."""
    contents = open_cache(pristine).manifest.contents
    for path in selection.covers(contents):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pristine / path, target / path)
    write_selection(target, selection, **said)  # type: ignore[arg-type]
    shutil.copy(pristine / layout.MANIFEST, target / layout.MANIFEST)
    return target


def test_everything_that_a_selection_needs_comes_along(pristine: Path, tmp_path: Path) -> None:
    whole = open_cache(pristine)
    for selection in (LOGITS, LAYER):
        path = part_of(pristine, tmp_path / f"{selection.text}", selection, origin="mine@3")
        cache = open_cache(path)
        assert cache.identity == whole.identity
        assert verify(path) == []
        assert unreferenced(path) == to_come(path) == []
        assert (cache.locate(whole.text_ids("part-00001"))[0] == 1).all()
        assert len(cache.examples("train").labels) == len(whole.examples("train").labels)
        assert (cache.outputs("bert", "part-00000").logits == whole.outputs("bert", "part-00000").logits).all()
    assert (cache.hidden("bert", "part-00000", 2).values == whole.hidden("bert", "part-00000", 2).values).all()
    assert cache.basis("bert", 2).target_variance == 1.5
    assert len(cache.tokens("bert", "part-00000").offsets) == 5
    assert cache.texts("part-00000") == whole.texts("part-00000")


@pytest.mark.parametrize(
    ("selection", "read", "what", "flags"),
    [
        (
            LAYER,
            lambda cache: cache.hidden("bert", "part-00000", 4),
            "layer 4 of teacher 'bert'",
            "--teachers bert --layers 4 --to",
        ),
        (LAYER, lambda cache: cache.basis("bert", 4), "layer 4 of teacher 'bert'", "--teachers bert --layers 4 --to"),
        (
            LAYER,
            lambda cache: cache.outputs("roberta", "part-00004"),
            "teacher 'roberta'",
            "--teachers roberta --no-hidden --to",
        ),
        (
            LOGITS,
            lambda cache: cache.tokens("bert", "part-00000"),
            "the hidden states of teacher 'bert'",
            "--teachers bert --no-text --to",
        ),
        (LOGITS, lambda cache: cache.texts("part-00000"), "the texts", "--teachers bert --no-hidden --to"),
        (
            LOGITS,
            lambda cache: cache.check_present(["text/part-00000.arrow"]),
            "the texts",
            "--teachers bert --no-hidden --to",
        ),
    ],
)
def test_what_was_not_pulled_is_refused_with_the_command_that_pulls_it(
    pristine: Path, tmp_path: Path, selection: Selection, read: Callable[..., object], what: str, flags: str
) -> None:
    path = part_of(pristine, tmp_path / "part", selection, origin="mine@3")
    with pytest.raises(MismatchError, match=f"{what} was not pulled") as caught:
        read(open_cache(path))
    assert caught.value.hint == f"Fetch it with: kdcache cache pull mine@3 {flags} {path}"
    write_selection(path, selection)
    with pytest.raises(MismatchError) as caught:
        read(open_cache(path))
    assert caught.value.hint.startswith("Fetch it with: kdcache cache pull NAME ")


def test_a_selected_file_that_is_missing_is_damage(pristine: Path, tmp_path: Path) -> None:
    path = part_of(pristine, tmp_path / "part", LAYER)
    gone = "teachers/bert/hidden/part-00001.zarr/layer-02/c/0/0"
    delete(path / gone)
    assert [damage.file for damage in verify(path)] == [gone]
    with pytest.raises(DamageError, match="is missing"):
        open_cache(path).hidden("bert", "part-00001", 2)


def test_what_is_still_to_be_fetched_is_not_damage(pristine: Path, tmp_path: Path) -> None:
    path = part_of(pristine, tmp_path / "part", LAYER, complete=False, origin="mine@3")
    open_cache(path)  # all is there: the process died before it said so
    for gone in ("teachers/bert/hidden/part-00001.zarr/layer-02/c/0/0", "texts/part-00002.arrow"):
        delete(path / gone)
    assert verify(path) == []
    assert to_come(path) == ["teachers/bert/hidden/part-00001.zarr/layer-02/c/0/0", "texts/part-00002.arrow"]
    with pytest.raises(MismatchError, match="is not complete") as caught:
        open_cache(path)
    assert caught.value.hint == f"Complete it with: kdcache cache pull mine@3 --teachers bert --layers 2 --to {path}"
    assert open_cache(path, incomplete=True).identity


def test_unions_and_wholes(pristine: Path, tmp_path: Path) -> None:
    contents = open_cache(pristine).manifest.contents
    both = union(LOGITS, Selection({"roberta": (4,), "bert": (2,)}))
    assert both == Selection({"bert": (2,), "roberta": (4,)}, text=True)
    assert union(both, Selection(None, text=False)) == Selection() and Selection().covers(contents) == set(
        contents.files
    )
    assert LAYER.covers(contents) < both.covers(contents) < Selection().covers(contents)
    write_selection(tmp_path, both, complete=False, origin="a@1")
    assert read_local(tmp_path) == LocalSelection(both, complete=False, origin="a@1")
    assert read_local(tmp_path).selection == both
    write_selection(tmp_path, Selection())
    assert read_local(tmp_path) is None and not (tmp_path / SELECTION).exists()


def test_choosing_by_flags(pristine: Path) -> None:
    contents = open_cache(pristine).manifest.contents
    assert choose(contents) == Selection()
    assert choose(contents, ["roberta"], text=False) == Selection({"roberta": (2, 4)}, text=False)
    assert choose(contents, layers=[4]) == Selection({"bert": (4,), "roberta": (4,)})
    assert choose(contents, hidden=False) == Selection({"bert": (), "roberta": ()})
    with pytest.raises(MismatchError, match="no teacher 'gpt'; it has: bert, roberta"):
        choose(contents, ["gpt"])
    with pytest.raises(MismatchError, match="no layer 3 of bert; it has bert: 2, 4"):
        choose(contents, ["bert"], [3])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"format":"kdcache-selection","version":1,"teachers":{"bert":[2]},"text":"yes","complete":"yes","more":1}',
        b'{"format":"kdcache-selection","version":1,"teachers":{"../bert":[2]},"text":"yes","complete":"yes"}',
        b'{"format":"kdcache-selection","version":1,"teachers":{"gpt":[2]},"text":"yes","complete":"yes"}',
        b'{"format":"kdcache-selection","version":1,"teachers":{"bert":[3]},"text":"yes","complete":"yes"}',
        b'{"format":"kdcache-selection","version":1,"teachers":{"bert":[2.0]},"text":"yes","complete":"yes"}',
        b'{"format":"kdcache-selection","version":1,"teachers":"all","text":true,"complete":"yes"}',
        b'{"format":"kdcache-selection","version":1,"teachers":"all","text":"yes","complete":"yes",'
        b'"origin":"x; rm -rf /"}',
        b'{"format":"kdcache-selection","version":1,"teachers":"all","teachers":"all","text":"yes","complete":"yes"}',
        b"[" * 100_000,
        b" " * ((8 << 20) + 1),
    ],
)
def test_a_selection_from_somebody_else_is_read_strictly(pristine: Path, copy_of: Copy, content: bytes) -> None:
    path = copy_of(pristine)
    (path / SELECTION).write_bytes(content)
    with pytest.raises(DamageError, match=r"\.selection\.json") as caught:
        open_cache(path)
    assert caught.value.exit_code == 3
    assert [damage.file for damage in verify(path)] == [SELECTION]
