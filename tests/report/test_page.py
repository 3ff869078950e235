"""The page of a run: complete, self-contained, and robust against a torn log."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kdcache.errors import DamageError, RecipeError
from kdcache.report.loaded import read_results
from kdcache.report.losses import loss_shares, read_curves, scales, weights_of_terms
from kdcache.report.page import write_page
from kdcache.runs import RunDirectory, mark_finished
from tests.report.test_table import results


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "reviews")
    directory.create()
    directory.recipe_file.write_text('name = "reviews"  # <escaped>\n')
    directory.results.write_text(json.dumps(results(0.84)))
    lines = [
        {
            "stage": "distill",
            "event": "steps",
            "step": step,
            "epoch": 1,
            "loss": 2.0 / step,
            "hidden": 100.0 * step,
            "steps": 10,
        }
        for step in (10, 20, 30)
    ]
    lines.append({"stage": "distill", "event": "epoch", "step": 30, "epoch": 1, "accuracy": 0.8})
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "dis')
    mark_finished(directory, "student", {}, 12.34)
    return directory


class _Tags(HTMLParser):
    """Every start tag with its attributes; unbalanced ones fail."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_balanced_file_that_loads_nothing(run: RunDirectory) -> None:
    text = write_page(run).read_text()
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert not any("src" in attributes for _, attributes in tags.seen)
    assert all((attributes.get("href") or "#").startswith("#") for _, attributes in tags.seen)  # within the page
    assert not any(tag in ("link", "iframe", "img", "object", "base") for tag, _ in tags.seen)
    assert "default-src 'none'" in text  # so a browser loads nothing, whatever a chart asks for
    assert len(text.encode()) < 2_000_000
    assert "&lt;escaped&gt;" in text
    assert "0.8400" in text
    assert "12.3" in text
    assert f"kdcache report {run.root} --predict" in text  # what a run of 0.1.0 lacks, and how to make it


def test_the_page_compares_with_the_baseline(run: RunDirectory) -> None:
    run.baseline.create()
    run.baseline.results.write_text(json.dumps(results(0.83, "fine-tune")))
    assert "within chance" in write_page(run).read_text()


def test_scales_show_which_term_is_large(run: RunDirectory) -> None:
    rows = {row["term"]: row for row in scales(read_curves(run.metrics, "steps"))}
    assert rows["hidden"] == {"term": "hidden", "first": 1000.0, "last": 3000.0, "median": 2000.0, "largest": 3000.0}
    assert set(rows) == {"loss", "hidden"}


def test_shares_of_weighted_terms_and_of_terms_that_a_schedule_switches_off(tmp_path: Path) -> None:
    steps = [  # the second half learns from soft labels alone, and 'hidden' is logged all the same
        {"step": 1, "loss": 0.5 + 0.1 * 3.0, "soft": 0.5, "hidden": 3.0},
        {"step": 2, "loss": 0.4, "soft": 0.4, "hidden": 2.0},
    ]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"stage": "distill", "event": "steps", **line}) + "\n" for line in steps))
    found = loss_shares(read_curves(log, "steps"), {"soft": 1.0, "hidden": 0.1})
    assert found is not None
    assert found.values.tolist() == [[0.5, pytest.approx(0.3)], [0.4, 0.0]]
    assert found.of_all() == {"soft": pytest.approx(0.9 / 1.2), "hidden": pytest.approx(0.3 / 1.2)}


def test_weights_of_terms_are_those_of_the_recipe_in_results_of_0_1_0() -> None:
    old = {"settings": {"weights": {"task": 1.0, "soft": 0.5, "hidden": 0.1}, "paper": False}}
    assert weights_of_terms(old, "distill") == {"task": 1.0, "soft": 0.5, "hidden": 0.1}
    assert weights_of_terms({**old, "term_weights": {"distill": {"dkd": 2.0}}}, "distill") == {"dkd": 2.0}


def test_no_log_no_curves(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "metrics.jsonl", "steps") == []


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds no results\.json"):
        write_page(RunDirectory(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_results_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DamageError, match=r"results\.json"):
        read_results(RunDirectory(tmp_path))
