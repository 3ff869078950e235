"""The arrays of a recipe's data are what a plain loop reads; those of millions of rows are mapped and read once."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache import kept
from kdcache.cache.ids import id_array, text_id
from kdcache.cache.text_table import TextTable, ids_of_texts, list_of, look_up
from kdcache.data import splits, spools, task
from kdcache.data.task import TaskData, load_task
from kdcache.errors import DataError
from kdcache.recipe import DataSection
from kdcache.runs import home
from tests.data import reference


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kept, "_told", [])
    monkeypatch.setattr("kdcache.data.reading._BATCH", 5)
    monkeypatch.setattr("kdcache.data.reading._BLOCK", 64)
    monkeypatch.setattr("kdcache.cache.text_table._TOGETHER", 3)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(rows[0]), *(mark.join("" if v is None else str(v) for v in row.values()) for row in rows)]
        path.write_text("\r\n".join(lines) + "\n\n", encoding="utf-8-sig")
    return str(path)


def some_rows(count: int, seed: int, labels: tuple[Any, ...] = ("bad", "good", None)) -> list[dict[str, Any]]:
    """Texts that repeat within a file and between files, some of them empty."""
    rng = random.Random(seed)
    words = ["", " ", "a", "crème 🙂", "dull", "fine", "a film", "long " * 9]
    return [
        {
            "text": f"{rng.choice(words)} {rng.randrange(30)}" if rng.random() < 0.9 else rng.choice(("", " ")),
            "other": rng.choice(words),
            "label": rng.choice(labels),
            "kind": rng.choice(("x", "y")),
        }
        for _ in range(count)
    ]


def section(tmp_path: Path, ending: str, **keys: Any) -> DataSection:
    files = {"train": 60, "validation": 25, "test": 20}
    labelled = ("bad", "good")
    values: dict[str, Any] = {
        split: write(
            tmp_path / f"{split}{ending}", some_rows(count, seed, (*labelled, *([None] if split == "train" else [])))
        )
        for seed, (split, count) in enumerate(files.items())
    }
    values["transfer"] = [write(tmp_path / f"more{seed}{ending}", some_rows(40, seed)) for seed in (7, 8)]
    values |= {"text": ["text"], "label": "label"} | keys
    return DataSection.model_validate({name: value for name, value in values.items() if value is not None})


def same(found: TaskData, wanted: TaskData) -> bool:
    assert list(found.texts) == list(wanted.texts) and len(found.texts) == len(wanted.texts)
    assert list(found.texts.values()) == list(wanted.texts.values())
    assert list(found.splits) == list(wanted.splits)
    for split, examples in wanted.splits.items():
        own = found.splits[split]
        assert np.array_equal(own.text_ids, examples.text_ids) and np.array_equal(own.labels, examples.labels)
        assert own.labels.dtype == examples.labels.dtype and own.text_ids.dtype == examples.text_ids.dtype
        assert own.groups == examples.groups
    assert json.dumps(found.counts.as_dict()) == json.dumps(wanted.counts.as_dict())
    assert (found.label_names, found.text_columns, found.labels_declared) == (
        wanted.label_names,
        wanted.text_columns,
        wanted.labels_declared,
    )
    return True


def refuse(*_: Any) -> Any:
    raise AssertionError("read again although it is kept")


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"text": ["text", "other"], "group": "kind"},
        {"validation": None, "validation_fraction": 0.3, "transfer_rows": 9, "seed": 3},
        {"validation": None, "test": None, "transfer": [], "labels": ["good", "bad"]},
    ],
)
def test_data_are_what_a_plain_loop_reads(
    ending: str, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = section(tmp_path, ending, **keys)
    wanted = reference.load_task(data)
    found = load_task(data)
    assert same(found, wanted) and isinstance(found.texts, dict)
    assert not home().exists(), "small files write nothing"
    monkeypatch.setattr(task, "LARGE", 10)
    found = load_task(data)
    assert same(found, wanted) and isinstance(found.texts, TextTable)
    kept._found_whole.clear()
    monkeypatch.setattr(task, "read_splits", refuse)
    assert same(load_task(data), wanted)
    (file,) = (home() / "data").glob("*.bin")
    assert wanted.counts.duplicates and (keys or wanted.counts.transfer_dropped)
    file.unlink()


def test_what_the_result_depends_on_makes_it_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "LARGE", 10)
    load_task(section(tmp_path, ".tsv"))

    def changed_file() -> DataSection:
        data = section(tmp_path, ".tsv")
        Path(data.test or "").write_bytes(Path(data.test or "").read_bytes().replace(b"bad", b"good", 1))
        return data

    for number, make in enumerate(
        [
            lambda: section(tmp_path, ".tsv", seed=1),
            lambda: section(tmp_path, ".tsv", transfer_rows=3),
            lambda: section(tmp_path, ".tsv", labels=["good", "bad"]),
            lambda: section(tmp_path, ".tsv", text=["other"]),
            lambda: section(tmp_path, ".tsv", group="kind"),
            lambda: section(tmp_path, ".tsv", test=None),
            changed_file,
        ],
        start=2,
    ):
        load_task(make())
        assert len(list((home() / "data").glob("*.bin"))) == number
    load_task(section(tmp_path, ".tsv", max_length=7, licence="CC0"))
    (tmp_path / "copy").mkdir()
    load_task(section(tmp_path / "copy", ".tsv"))
    assert len(list((home() / "data").glob("*.bin"))) == 8, "lengths, licences and places of files change nothing"


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: data[:90] + b"!" + data[91:]])
def test_damage_and_a_home_that_takes_nothing_change_nothing(
    damage: Callable[[bytes], bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = section(tmp_path, ".tsv")
    wanted = load_task(data)
    monkeypatch.setattr(task, "LARGE", 10)
    load_task(data)
    (file,) = (home() / "data").glob("*.bin")
    sound = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(sound))
    kept._found_whole.clear()
    assert same(load_task(data), wanted)
    assert file.read_bytes() == sound
    (tmp_path / "a file").write_bytes(b"")
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "a file"))
    found = load_task(data)
    assert isinstance(found.texts, dict) and list(found.texts.items()) == list(wanted.texts.items())
    assert "read into memory" in caplog.text


def test_a_disk_that_is_full_while_reading_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = section(tmp_path, ".tsv")
    wanted = load_task(data)
    monkeypatch.setattr(task, "LARGE", 10)
    real = spools.tempfile.TemporaryFile

    def full(**arguments: Any) -> Any:
        file = real(**arguments)
        with Path("/dev/full").open("wb") as device:
            os.dup2(device.fileno(), file.fileno())
        return file

    monkeypatch.setattr(spools.tempfile, "TemporaryFile", full)
    found = load_task(data)
    assert list(found.texts.items()) == list(wanted.texts.items()) and "No space left" in caplog.text
    assert not list((home() / "data").glob("*.bin"))


FAULTS: list[tuple[str, Callable[[list[dict[str, Any]]], object], dict[str, Any]]] = [
    ("train", lambda rows: rows[33].update(label="3.7"), {}),
    ("train", lambda rows: rows[33].update(text="a\tb"), {}),
    ("train", lambda rows: [row.update(text="") for row in rows], {}),
    ("train", lambda rows: [row.update(label="") for row in rows], {}),
    ("train", lambda rows: [row.update(label="bad") for row in rows], {}),
    ("train", lambda rows: rows[40].update(label="2"), {"labels": ["bad", "good"]}),
    ("validation", lambda rows: rows[13].update(label="new"), {}),
    ("validation", lambda rows: rows[17].update(text="x 1", label=""), {}),
    ("test", lambda rows: rows[13].update(label="-1"), {}),
    ("test", lambda rows: rows[6].update(text="a\0b"), {}),
    ("more7", lambda rows: rows[21].update(text="a\tb\tc"), {}),
    ("train", lambda _: None, {"text": ["absent"]}),
    ("train", lambda _: None, {"label": "absent"}),
    ("train", lambda _: None, {"group": "absent"}),
    ("train", lambda _: None, {"validation": None, "validation_fraction": 1e-9}),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
@pytest.mark.parametrize("ending", [".tsv", ".jsonl"])
def test_faults_are_told_of_as_by_a_plain_loop(
    number: int, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, fault, keys = FAULTS[number]
    data = section(tmp_path, ending, **keys)
    names = ("train", "validation", "test", "more7")
    rows = some_rows(60, names.index(split), ("bad", "good"))
    fault(rows)
    write(tmp_path / f"{split}{ending}", rows)

    def message(load: Callable[[DataSection], TaskData]) -> str:
        try:
            load(data)
        except DataError as error:
            return f"{error.message} | {error.hint}"
        return "none"

    wanted = message(reference.load_task)
    assert wanted != "none" or ending == ".jsonl", "tabs are no fault of JSON"
    assert message(load_task) == wanted
    monkeypatch.setattr(task, "LARGE", 10)
    assert message(load_task) == wanted
    assert wanted == "none" or not list((home() / "data").glob("*.bin"))


def test_bytes_that_are_no_text_are_told_of_with_their_line(tmp_path: Path) -> None:
    data = section(tmp_path, ".tsv")
    path = Path(data.train)
    lines = path.read_bytes().split(b"\n")
    for bad, said in ((b"\xff", "line 41 is not UTF-8: byte 0xff"), (b"\0", "line 41 holds a NUL byte")):
        path.write_bytes(b"\n".join([*lines[:40], lines[40] + bad, *lines[41:]]))
        with pytest.raises(DataError, match=said):
            load_task(data)


@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=3)), min_size=1, max_size=30, unique=True), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_table_is_a_dict(texts: list[tuple[str, str]], data: st.DataObject) -> None:
    plain = {text_id(text): text for text in texts}
    with ExitStack() as files:
        spool = spools.TextSpool(spools.spools_in(files), 2)
        spool.add(list(plain), list(plain.values()))
        rows = np.arange(len(plain))
        numbers, distinct = splits._numbered(spool.ids())
        assert distinct == len(plain)
        arrays = splits._texts_in_order({}, rows, numbers, spool.ids()) | spool.arrays()
    table = TextTable(arrays, arrays["ids"])
    assert dict(table) == plain and list(table) == list(plain) and table == plain
    some = data.draw(st.lists(st.sampled_from(list(plain)), unique=True))
    view, rest = table.view(id_array(some)), [one for one in plain if one not in some]
    assert dict(view) == {one: plain[one] for one in some} and ids_of_texts(view).tolist() == id_array(some).tolist()
    assert all((one in view) == (one in some) for one in plain) and bytes(16) not in view and "x" not in view
    for asked in ([*rest, bytes(16), *some], []):
        assert look_up(view, asked) == [plain[one] if one in some else None for one in asked]
    with pytest.raises(KeyError):
        table[bytes(16)]
    both = view | table.view(id_array(rest))
    assert dict(both) == plain and list(both) == [*some, *rest]
    listed = both.texts()
    assert list(listed) == [plain[one] for one in both]
    assert len(listed) == len(plain) and listed[0] == next(iter(both.values()))
    assert listed[1:7] == list(listed)[1:7] and list(list_of(both)) == list(listed)


def test_ids_that_share_half_are_told_apart() -> None:
    ids = np.zeros((40, 16), np.uint8)
    ids[:, 9] = np.random.default_rng(0).permutation(40) // 2 * 2
    ids = np.unique(ids, axis=0)[np.random.default_rng(1).permutation(20)]
    high, low = splits.id_words(ids)
    order = splits.order_of_words(high, low)
    offsets = np.arange(21, dtype=np.int64)
    arrays = {
        "high": high[order], "low": low[order], "place": order, "ids": ids,
        "offsets.0": offsets, "values.0": np.arange(65, 85, dtype=np.uint8),
    }  # fmt: skip
    table = TextTable(arrays, ids)
    assert [text for (text,) in table.values()] == [chr(65 + row) for row in range(20)]
    assert b"\0" * 9 + b"\1" + b"\0" * 6 not in table
