"""Data sets by hub name, without a hub: real ``datasets`` objects, and a loader that a test puts in its place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from kdcache.data.reading import parse_spec, read_rows
from kdcache.data.task import load_task
from kdcache.errors import DataError
from kdcache.recipe import DataSection


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("stanfordnlp/sst2", ("stanfordnlp/sst2", None, "test")),
        ("imdb:/unsupervised", ("imdb", None, "unsupervised")),
        ("nyu-mll/glue:rte", ("nyu-mll/glue", "rte", "test")),
        ("nyu-mll/glue:mnli/validation_matched", ("nyu-mll/glue", "mnli", "validation_matched")),
    ],
)
def test_a_spec_is_name_config_and_split(spec: str, parsed: tuple[str, str | None, str]) -> None:
    assert parse_spec(spec, "test") == parsed


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="need the package 'datasets'") as caught:
        read_rows("stanfordnlp/sst2")
    assert "pip install 'kdcache[hub]'" in caught.value.hint


def test_a_hub_out_of_reach_is_told_together_with_the_path_that_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="could not be loaded") as caught:
        read_rows("nobody/nothing:config/train")
    assert str(tmp_path / "nobody") in caught.value.message
    assert "'nobody/nothing' (config config, split 'train')" in caught.value.message


def test_class_names_and_their_order_come_from_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["positive", "negative"])}
    )
    splits = {
        "train": {"sentence": ["a", "b", "c"], "label": [1, 0, -1]},
        "test": {"sentence": ["d", "e"], "label": [0, 1]},
    }

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        assert (name, config) == ("acme/reviews", "small")
        return datasets.Dataset.from_dict(splits[split], features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = "acme/reviews:small"
    data = load_task(DataSection(train=source, test=source, text=["sentence"], label="label"))
    assert data.label_names == ("positive", "negative")
    assert data.splits["train"].labels.tolist() == [1, 0, -1]
    assert data.splits["test"].labels.tolist() == [0, 1]


def _put(monkeypatch: pytest.MonkeyPatch, names: list[str], labels: list[int]) -> str:
    """A hub data set of one split whose features name the classes."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict(
        {"text": [f"text {row}" for row in range(len(labels))], "label": labels}, features=features
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    return "acme/reviews"


def test_a_data_set_that_names_its_classes_declares_their_order_for_files_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _put(monkeypatch, ["positive", "negative"], [1, 0, 1])
    test = tmp_path / "test.tsv"
    test.write_text("text\tlabel\na\t0\nb\t1\nc\tnegative\n")
    data = load_task(DataSection(train=source, test=str(test), text=["text"], label="label"))
    assert data.label_names == ("positive", "negative")
    assert data.splits["test"].labels.tolist() == [0, 1, 1]
    assert data.labels_declared


def test_files_with_sorted_names_do_not_give_numbers_a_meaning_but_a_data_set_meets_them_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = tmp_path / "train.tsv"
    train.write_text("text\tlabel\na\tpositive\nb\tnegative\n")
    source = _put(monkeypatch, ["positive", "negative"], [0, 1])
    data = load_task(DataSection(train=str(train), test=source, text=["text"], label="label"))
    assert data.label_names == ("negative", "positive")
    assert data.splits["test"].labels.tolist() == [1, 0]
    assert not data.labels_declared


def test_integers_that_are_names_of_a_data_set_are_not_class_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    source = _put(monkeypatch, ["1", "0"], [0, 1])
    assert load_task(DataSection(train=source, text=["text"], label="label")).splits["train"].labels.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"has the label '1', which data\.labels does not have"):
        load_task(DataSection(train=source, text=["text"], label="label", labels=["negative", "positive"]))
    same = _put(monkeypatch, ["0", "1"], [0, 1])
    found = load_task(DataSection(train=same, text=["text"], label="label", labels=["negative", "positive"]))
    assert found.splits["train"].labels.tolist() == [0, 1]
