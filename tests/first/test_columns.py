"""Which columns are taken for the text and the label, and which file for which split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdcache.data.reading import Rows
from kdcache.errors import DataError, RecipeError
from kdcache.first import columns
from kdcache.first.columns import label_guesses, text_guess
from kdcache.first.files import read_files, split_named

WORDS = [f"this is text number {row} of a few" for row in range(30)]
OTHERS = [f"and this is another one, number {row}" for row in range(30)]
TWO = ["bad", "good"] * 15
THREE = ["a", "b", "c"] * 10


def rows_of(**columns: Any) -> Rows:
    return Rows("file.jsonl", columns, range(1, 31))


CASES = [
    pytest.param({"sentence": WORDS, "label": TWO}, ("sentence",), ["label"], id="GLUE"),
    pytest.param({"premise": WORDS, "hypothesis": OTHERS, "gold_label": THREE}, ("premise", "hypothesis"),
                 ["gold_label"], id="a pair by names"),
    pytest.param({"Text A": WORDS, "Text B": OTHERS, "y": TWO}, ("Text A", "Text B"), ["y"], id="a pair by letters"),
    pytest.param({"s1": WORDS, "s2": OTHERS, "class": TWO}, ("s1", "s2"), ["class"], id="a pair by numbers"),
    pytest.param({"id": list(range(30)), "words": WORDS, "mood": TWO}, ("words",), ["mood"], id="unknown names"),
    pytest.param({"text": WORDS, "label": [0, 1] * 15, "label_text": TWO}, ("text",), ["label"], id="names as well"),
    pytest.param({"TEXT": WORDS, "Label": [True, False] * 15}, ("TEXT",), ["Label"], id="case, truth values"),
    pytest.param({"question": WORDS, "answer": OTHERS, "topic": THREE}, ("question", "answer"), ["topic"], id="QA"),
    pytest.param({"question": WORDS, "answer": TWO}, ("question",), ["answer"], id="an answer of two words"),
    pytest.param({"title": OTHERS, "text": WORDS, "score": [0.5 + row for row in range(30)], "tag": TWO}, ("text",),
                 ["tag"], id="a score is no class"),
    pytest.param({"text": WORDS, "color": TWO, "size": THREE}, ("text",), ["color", "size"], id="several alike"),
    pytest.param({"text": WORDS, "label": [None] * 30}, ("text",), [], id="an empty label column"),
    pytest.param({"text": WORDS, "id": list(range(30))}, ("text",), [], id="an id is no label"),
    pytest.param({"": WORDS, "text": OTHERS, "label": TWO}, ("text",), ["label"], id="a column without a name"),
    pytest.param({"input": WORDS, "target": OTHERS}, ("input",), [], id="a text to generate is no label"),
    pytest.param({"text": ["日本語のテキスト"] * 29 + ["猫"], "label": TWO}, ("text",), ["label"], id="no spaces"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "text", "labels"), CASES)
def test_guesses(given: dict[str, Any], text: tuple[str, ...], labels: list[str]) -> None:
    rows = rows_of(**given)
    guesses = label_guesses(rows)
    assert [guess.columns[0] for guess in guesses] == labels
    guess = text_guess(rows, labels[0] if labels else None)
    assert guess.columns == text
    assert all(one.why for one in (guess, *guesses))


def test_a_label_at_the_end_of_a_sorted_file_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_LOOKED_AT", 60)
    rows = Rows("f", {"text": [f"text {row}" for row in range(600)], "kind": ["a"] * 590 + ["b"] * 10}, range(600))
    assert [guess.columns for guess in label_guesses(rows)] == [("kind",)]


def test_no_text_column() -> None:
    with pytest.raises(DataError, match=r"no column of file.jsonl looks like a text; it has: 'label', 'n'") as raised:
        text_guess(rows_of(label=TWO, n=list(range(30))), "label")
    assert "--text" in raised.value.hint


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.tsv", "train"), ("imdb-dev.csv", "validation"), ("x_test.parquet", "test"), ("Valid.TSV", "validation"),
        ("unlabeled.jsonl", "transfer"), ("reviews.csv", None), ("contest.tsv", None), ("org/set:/test", "test"),
    ],
)  # fmt: skip
def test_names_of_splits(name: str, split: str | None) -> None:
    assert split_named(name) == split


def _write(folder: Path, **files: bool) -> list[str]:
    paths = []
    for name, labelled in files.items():
        path = folder / f"{name}.tsv"
        lines = [f"{text}\t{label if labelled else ''}" for text, label in zip(WORDS, TWO, strict=True)]
        path.write_text("\n".join(["text\tlabel", *lines]))
        paths.append(str(path))
    return paths


def test_files_by_name_and_by_what_they_hold(tmp_path: Path) -> None:
    files = read_files(_write(tmp_path, a_train=True, dev=True, test=False, more=False), {})
    assert Path(files.train.source).name == "a_train.tsv"
    assert files.validation is not None
    assert files.test is None  # without labels it cannot be scored
    assert [Path(rows.source).name for rows in files.transfer] == ["test.tsv", "more.tsv"]
    assert len(files.why) == 4


def test_flags_win_over_names(tmp_path: Path) -> None:
    first, second = _write(tmp_path, dev=True, other=True)
    files = read_files([], {"train": [first], "test": [second]})
    assert (files.train.source, files.test and files.test.source) == (first, second)
    assert read_files([first], {}).train.source == first  # the only file


def test_two_files_for_one_split(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="2 files would be train"):
        read_files(_write(tmp_path, one=True, two=True), {})
