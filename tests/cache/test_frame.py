"""A cache as a table: every value is the stored one, whatever part it is in; and how a cache shows itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdcache
from kdcache.cache.ids import text_id
from kdcache.cache.shown import html_rows
from kdcache.errors import MismatchError, RecipeError
from tests.conftest import TinyRun


def test_every_row_has_its_text_label_and_logits(tiny_run: TinyRun) -> None:
    cache = kdcache.open_cache(tiny_run.cache)
    for split in cache.splits:
        examples = cache.examples(split)
        table = cache.to_arrow(split)
        assert table.column_names == [
            "sentence", "label", "logits_bert", "logits_roberta", "logits_xlm", "row", "text_id"
        ]  # fmt: skip
        rows = table.to_pylist()
        assert len(rows) == len(examples) > 0
        parts, places = cache.locate(examples.text_ids)
        for number, row in enumerate(rows):
            assert row["row"] == number
            assert row["text_id"] == examples.text_ids[number].tobytes().hex() == text_id((row["sentence"],)).hex()
            assert row["label"] == (None if examples.labels[number] < 0 else examples.labels[number])
            for teacher in cache.teachers:
                stored = cache.outputs(teacher, cache.parts[parts[number]].name).logits[places[number]]
                assert np.array_equal(np.array(row[f"logits_{teacher}"], np.float32), stored)


def test_batches_are_read_part_by_part(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = kdcache.open_cache(tiny_run.cache)
    read: list[str] = []
    outputs = cache.outputs
    monkeypatch.setattr(cache, "outputs", lambda teacher, part: read.append(part) or outputs(teacher, part))
    batches = cache.to_batches("train", ["xlm"])
    assert read == []
    first = batches.read_next_batch()
    assert len(read) == 1
    assert first.schema.names == ["sentence", "label", "logits_xlm", "row", "text_id"]
    rest = list(batches)
    assert len(read) == len(set(read)) == 1 + len(rest) > 1
    whole = cache.to_arrow("train", ["xlm"])
    assert sorted(row for batch in (first, *rest) for row in batch["row"].to_pylist()) == whole["row"].to_pylist()


def test_pandas_keeps_labels_whole(tiny_run: TinyRun) -> None:
    cache = kdcache.open_cache(tiny_run.cache)
    frame, table = cache.to_pandas("train", text=False), cache.to_arrow("train")
    assert str(frame["label"].dtype) == "Int64"
    assert frame["label"].tolist() == table["label"].to_pylist()
    assert "sentence" not in frame
    assert frame["logits_bert"][3].tolist() == table["logits_bert"][3].as_py()
    assert cache.to_pandas("transfer")["label"].isna().all()


def test_without_pandas_the_error_names_it(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RecipeError, match="to_pandas needs the package 'pandas'") as raised:
        kdcache.open_cache(tiny_run.cache).to_pandas("train")
    assert "pip install pandas" in raised.value.hint


def test_what_the_cache_lacks_is_named(tiny_run: TinyRun) -> None:
    cache = kdcache.open_cache(tiny_run.cache)
    with pytest.raises(MismatchError, match="has no split 'dev'; it has: "):
        cache.to_arrow("dev")
    with pytest.raises(MismatchError, match="has no teacher 'gpt'; it has: bert, roberta, xlm"):
        cache.to_arrow("train", ["gpt"])


def test_datasets_knows_the_classes(tiny_run: TinyRun) -> None:
    metadata: Any = kdcache.open_cache(tiny_run.cache).to_arrow("test").schema.metadata
    assert b'"ClassLabel"' in metadata[b"huggingface"]


def test_a_cache_in_one_line_and_as_html(tiny_run: TinyRun) -> None:
    cache = kdcache.open_cache(tiny_run.cache)
    line = repr(cache)
    assert line.startswith(f"Cache('{tiny_run.cache}': 3 teachers: bert, roberta, xlm; 184 texts; ")
    assert "train 96" in line
    assert line.endswith(f"identity {cache.identity[:12]})")
    shown = cache._repr_html_()
    assert "<td>roberta</td><td>24</td>" in shown
    assert "8 dimensions, int8" in shown
    assert "<td>train</td><td>96</td>" in shown


def test_names_are_escaped() -> None:
    assert "<td>&lt;script&gt;</td>" in html_rows(("<a>",), [("<script>",)])
    assert "<th>&lt;a&gt;</th>" in html_rows(("<a>",), [])


def test_repr_imports_neither_pyarrow_nor_torch(tiny_run: TinyRun) -> None:
    code = (
        f"import sys, kdcache; cache = kdcache.open_cache({str(Path(tiny_run.cache))!r}); repr(cache); "
        "cache._repr_html_(); assert not {'torch', 'pyarrow', 'pandas', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
