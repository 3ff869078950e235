"""A cache as parquet and JSON lines: every value exact, in bounded memory, and complete after a kill."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from kdcache import open_cache
from kdcache.cache.ids import text_id
from kdcache.cache.reader import Cache
from kdcache.data.cache_export import ExportChoice, export_cache
from kdcache.data.labels import ClassOrder, label_cells, label_numbers
from kdcache.data.reading import read_rows
from kdcache.data.table_files import _cells
from kdcache.errors import MismatchError, StorageError
from kdcache.files import use_disk
from kdcache.progress import SilentProgress
from kdcache.testing.caches import Plan, dump, made_plan, made_teacher
from kdcache.testing.faults import Died, dying_disk, failing_disk
from tests.cli.commands import kdcache
from tests.conftest import TinyRun

SILENT = SilentProgress()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    dump(tmp_path / "cache", made_plan())
    return tmp_path / "cache"


def expected(cache: Cache, split: str) -> dict[int, Mapping[str, Any]]:
    """By row number, in a plain loop."""
    examples, rows = cache.examples(split), {}
    for number, one in enumerate(examples.text_ids):
        for part in cache.parts:
            ids = [bytes(known) for known in cache.text_ids(part.name)]
            if bytes(one) in ids:
                place = ids.index(bytes(one))
                label = int(examples.labels[number])
                row: dict[str, Any] = {"sentence": cache.texts(part.name)[place][0], "text_id": bytes(one).hex()}
                row["label"] = None if label < 0 else label
                for name in cache.teachers:
                    outputs = cache.outputs(name, part.name)
                    assert outputs.pooled is not None
                    row[f"logits_{name}"] = outputs.logits[place].tobytes()
                    row[f"pooled_{name}"] = outputs.pooled[place].tobytes()
                rows[number] = row
    return rows


def read(directory: Path, split: str) -> dict[int, Mapping[str, Any]]:
    """The rows of an export by number; vectors as the bytes of their float32."""
    rows: list[dict[str, Any]] = []
    for file in sorted((directory / "data").glob(f"{split}-*")):
        if file.suffix == ".parquet":
            rows += parquet.read_table(file).to_pylist()
        else:
            rows += [json.loads(line) for line in file.read_text().splitlines()]
    found = {}
    for row in rows:
        values = {k: np.array(v, np.float32).tobytes() if isinstance(v, list) else v for k, v in row.items()}
        found[values.pop("row")] = values
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_every_value_is_exact(cache: Path, tmp_path: Path, to: Any) -> None:
    opened = open_cache(cache)
    report = export_cache(opened, tmp_path / "out", ExportChoice(to, pooled=True), progress=SILENT)
    assert report.rows == {"train": 10, "test": 5}
    for split in opened.splits:
        assert read(tmp_path / "out", split) == expected(opened, split)


@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_an_export_read_as_data_has_the_same_classes(tmp_path: Path, to: Any) -> None:
    """Also where the classes are integers in another order: a number in the file would be the class of that name."""
    plan = made_plan()
    dump(tmp_path / "cache", replace(plan, task=replace(plan.task, label_names=("1", "0"))))
    opened = open_cache(tmp_path / "cache")
    export_cache(opened, tmp_path / "out", ExportChoice(to), progress=SILENT)
    rows = read_rows(str(next((tmp_path / "out" / "data").glob("train-*"))))
    found = label_numbers(
        rows, label_cells(rows, "label"), ClassOrder(opened.task.label_names, "data.labels"), "label", scored=False
    )
    expected = opened.examples("train").labels[:][rows.columns["row"]]
    assert found.tolist() == expected.tolist()
    assert set(found.tolist()) == {-1, 0, 1}


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_json_gives_every_float32_back(values: list[float]) -> None:
    array = np.array([values], np.float32)
    assert np.array(json.loads(_cells("logits", array)[0]), np.float32).tobytes() == array.tobytes()


@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_datasets_and_pandas_read_it(tiny_run: TinyRun, tmp_path: Path, to: str) -> None:
    datasets = pytest.importorskip("datasets")
    import pandas

    said = kdcache("cache", "export", tiny_run.cache, "--to", to, "--output-dir", tmp_path / "out", "--json")
    assert said.code == 0, said.err
    assert said.document["rows"] == {"train": 96, "validation": 32, "test": 32, "transfer": 24}
    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))
    assert {name: len(rows) for name, rows in found.items()} == said.document["rows"]
    train = found["train"]
    assert train.column_names[:3] == ["sentence", "label", "logits_bert"]
    if to == "parquet":
        assert train.features["label"].names == ["0", "1"]
    assert set(train["label"]) == {0, 1} and set(found["transfer"]["label"]) == {None}
    cache = open_cache(tiny_run.cache)
    row = train[0]
    part, place = (int(one[0]) for one in cache.locate(np.frombuffer(text_id((row["sentence"],)), np.uint8)[None]))
    stored = cache.outputs("xlm", cache.parts[part].name).logits[place]
    assert np.array(row["logits_xlm"], np.float32).tobytes() == stored.tobytes()
    file = next((tmp_path / "out" / "data").glob("train-*"))
    table = pandas.read_parquet(file) if to == "parquet" else pandas.read_json(file, lines=True)
    assert len(table) == 96 and len(table["logits_bert"][0]) == 2


def test_probabilities_are_the_softmax(cache: Path, tmp_path: Path) -> None:
    choice = ExportChoice("parquet", ("test",), ("bert",), "probabilities", 2.0)
    report = export_cache(open_cache(cache), tmp_path / "out", choice, progress=SILENT)
    assert report.columns == ("sentence", "label", "probabilities_bert", "row", "text_id")
    logits = {
        n: np.frombuffer(row["logits_bert"], np.float32) for n, row in expected(open_cache(cache), "test").items()
    }
    for number, row in read(tmp_path / "out", "test").items():
        powers = np.exp(logits[number].astype(np.float64) / 2)
        np.testing.assert_allclose(
            np.frombuffer(row["probabilities_bert"], np.float32), powers / powers.sum(), rtol=1e-6
        )


def test_a_write_that_fails_anywhere_is_continued_to_the_same_bytes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.data.cache_export._ROWS", 4)  # a file per part
    opened = open_cache(cache)
    whole = export_cache(opened, tmp_path / "whole", ExportChoice(), progress=SILENT)
    assert whole.files == 5

    def content(directory: Path) -> dict[str, bytes]:
        return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    for number in range(2, 40, 3):
        target = tmp_path / f"cut-{number}"
        with (
            contextlib.suppress(StorageError, Died),
            use_disk(dying_disk(number) if number % 2 else failing_disk(number)),
        ):
            export_cache(opened, target, ExportChoice(), progress=SILENT)
        there = [path for path in target.rglob("*.parquet") if not path.name.startswith(".")]
        again = export_cache(opened, target, ExportChoice(), progress=SILENT)
        assert again.kept == len(there)
        assert content(target) == content(tmp_path / "whole")


def test_a_cache_without_texts_takes_them_from_the_data(tmp_path: Path) -> None:
    plan = made_plan()
    dump(tmp_path / "bare", Plan(plan.train, plan.test, plan.teachers, store_text=False))
    bare = open_cache(tmp_path / "bare")
    with pytest.raises(MismatchError, match=r"texts of cache .* are not here") as caught:
        export_cache(bare, tmp_path / "out", ExportChoice(), progress=SILENT)
    assert "--recipe" in caught.value.hint
    texts = {**plan.train, **plan.test}
    export_cache(bare, tmp_path / "out", ExportChoice(), texts=texts, progress=SILENT)
    dump(tmp_path / "cache", plan)
    assert read(tmp_path / "out", "train").keys() == expected(open_cache(tmp_path / "cache"), "train").keys()
    for row in read(tmp_path / "out", "train").values():
        assert text_id((row["sentence"],)).hex() == row["text_id"]
    few = dict(list(texts.items())[:3])
    with pytest.raises(MismatchError, match="not in the data of the recipe"):
        export_cache(bare, tmp_path / "few", ExportChoice(), texts=few, progress=SILENT)


def test_bad_input_is_one_line_and_nothing_is_lost(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    done, bare = tmp_path / "done", tmp_path / "bare"
    dump(bare, replace(made_plan(), teachers=(made_teacher("bert", pooled=None),)))
    assert kdcache("cache", "export", cache, "--output-dir", done).code == 0
    for arguments, code, message in (
        ((cache, "--output-dir", other), 4, "holds no export of a cache"),
        ((cache, "--output-dir", done, "--to", "jsonl"), 4, "another export: choice differs"),
        ((cache, "--output-dir", tmp_path / "x", "--split", "dev"), 4, "has no split 'dev'; it has: test, train"),
        ((cache, "--output-dir", tmp_path / "x", "--teacher", "gpt"), 4, "has no teacher 'gpt'; it has: bert, roberta"),
        ((cache, "--output-dir", tmp_path / "x", "--to", "csv"), 2, "the formats are parquet and jsonl"),
        ((cache, "--output-dir", tmp_path / "x", "--probabilities", "--temperature", "0"), 2, "above 0 was expected"),
        ((bare, "--output-dir", tmp_path / "x", "--pooled"), 4, "has no pooled vectors of bert"),
        ((tmp_path / "none", "--output-dir", tmp_path / "x"), 2, "there is no directory"),
    ):
        said = kdcache("cache", "export", *arguments)
        assert said.code == code, said.err
        assert message in said.err
        assert [line.split(":")[0] for line in said.err.splitlines()] == ["error", "hint"]
    assert not (tmp_path / "x").exists()
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    twice = ("--teacher", "bert", "--teacher", "bert", "--split", "test", "--split", "test")
    said = kdcache("cache", "export", cache, "--output-dir", tmp_path / "twice", *twice, "--json")
    assert said.document["columns"] == ["sentence", "label", "logits_bert", "row", "text_id"]
    again = kdcache("cache", "export", cache, "--output-dir", done, "--json")
    assert again.document["files_kept"] == again.document["files"] == 2
