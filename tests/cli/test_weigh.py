"""``kdcache weigh`` on caches of real dumps: its table, its JSON, what it refuses, and a cache on a remote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcache.cache.ids import Examples
from kdcache.cache.reader import Cache, open_cache
from kdcache.report.metrics import scores
from kdcache.share.push import push
from kdcache.share.stores.registry import open_remote
from tests.cli.commands import kdcache
from tests.conftest import TinyRun


def test_the_table_has_every_teacher_their_mean_and_the_mixture(tiny_run: TinyRun) -> None:
    said = kdcache("weigh", tiny_run.cache, "--split", "train")
    assert said.code == 0, said.err
    heads = [line.split("  ")[0] for line in said.out.splitlines()]
    assert heads[:1] == [""]
    assert heads[2:7] == ["teacher bert", "teacher roberta", "teacher xlm", "their mean", "fitted mixture"]
    assert "mixtures of 96 rows" in heads
    assert sum(line.endswith("chosen") for line in said.out.splitlines()) == 1
    assert "eave out" in said.out or "No teacher can be left out" in said.out
    assert "--set distill.teacher_weights" in said.err


def test_the_document_has_the_scores_of_the_stored_logits(tiny_run: TinyRun) -> None:
    document = kdcache("weigh", tiny_run.cache, "--split", "train", "--json").document
    cache = open_cache(tiny_run.cache)
    examples = cache.examples("train")
    parts, rows = cache.locate(examples.text_ids)
    for name, entry in document["teachers"].items():
        places = zip(parts.tolist(), rows.tolist(), strict=True)
        logits = np.array([cache.outputs(name, cache.parts[part].name).logits[row] for part, row in places])
        expected = scores(examples.labels, logits)
        assert entry["raw"]["accuracy"] == expected["accuracy"]
        assert entry["raw"]["nll"] == pytest.approx(expected["loss"])
    assert document["fitted"]["nll"] == pytest.approx(document["held_out_nll"][document["chosen"]])
    assert document["chosen"] == min(document["held_out_nll"], key=lambda kind: document["held_out_nll"][kind])
    assert document == kdcache("weigh", tiny_run.cache, "--split", "train", "--json").document


def test_labels_that_cannot_be_weighed_by_are_refused(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    few = kdcache("weigh", tiny_run.cache)
    assert few.code == 2
    assert "has 32 labelled texts (32 rows); weighing teachers needs at least 50" in few.err
    assert few.err.startswith("error: ") and few.err.count("\n") == 2  # the error and its cure
    unlabelled = kdcache("weigh", tiny_run.cache, "--split", "transfer")
    assert unlabelled.code == 2
    assert "has 0 labelled texts (24 rows)" in unlabelled.err
    unknown = kdcache("weigh", tiny_run.cache, "--split", "dev")
    assert unknown.code == 4
    assert "no split 'dev'; it has: " in unknown.err
    read = Cache.examples

    def constant_labels(cache: Cache, split: str) -> Examples:
        found = read(cache, split)
        return Examples(found.text_ids, np.zeros_like(found.labels), found.groups)

    monkeypatch.setattr(Cache, "examples", constant_labels)
    constant = kdcache("weigh", tiny_run.cache, "--split", "train")
    assert constant.code == 2
    assert "all labelled rows of 'train' of cache" in constant.err


def test_a_name_on_the_remote_is_read_without_the_hidden_states(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KDCACHE_REMOTE", str(tmp_path / "remote"))
    (tmp_path / "remote").mkdir()
    push(open_remote(str(tmp_path / "remote")), tiny_run.cache, "reviews")
    here = kdcache("weigh", tiny_run.cache, "--split", "train", "--json").document
    there = kdcache("weigh", "reviews", "--split", "train", "--json")
    assert there.code == 0, there.err
    assert there.document == here
    fetched = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not [path for path in fetched if "hidden" in path.parts or "tokens" in path.parts]
