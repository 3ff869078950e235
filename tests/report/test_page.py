"""The page of a run: complete, self-contained, and robust against a torn log."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from kdcache.report.curves import read_curves, scales, svg

from kdcache.errors import DamageError, RecipeError
from kdcache.report.page import page, read_results, write_page
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
    assert not any({"src", "href"} & attributes.keys() for _, attributes in tags.seen)
    assert sum(tag == "svg" for tag, _ in tags.seen) == 3  # loss, hidden, accuracy
    assert "&lt;escaped&gt;" in text
    assert "0.8400" in text
    assert "12.3" in text


def test_the_page_compares_with_the_baseline(run: RunDirectory) -> None:
    assert "within chance" in page(run, results(0.84), results(0.83, "fine-tune"))


def test_scales_show_which_term_is_large(run: RunDirectory) -> None:
    rows = {row["term"]: row for row in scales(read_curves(run.metrics, "steps"))}
    assert rows["hidden"] == {"term": "hidden", "first": 1000.0, "last": 3000.0, "median": 2000.0, "largest": 3000.0}
    assert set(rows) == {"loss", "hidden"}


def test_a_flat_curve_of_one_point_can_be_drawn(run: RunDirectory) -> None:
    (curve,) = read_curves(run.metrics, "epoch")
    assert "<polyline points=" in svg(curve)


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
