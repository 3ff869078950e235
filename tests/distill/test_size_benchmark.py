"""Accuracy against bytes, on as little as possible.

What it stores is what a dump would have stored, and the page tells of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from kdcache import open_cache
from kdcache.cache.reader import Cache
from kdcache.dump.stage import dump_teachers
from kdcache.progress import SilentProgress
from tests.conftest import TinyRun
from tests.distill.inside import programs_inside

SIZE = Path(__file__).parents[2] / "benchmarks" / "size.py"
FORMS = ("float16", "trellis-8th", "product-8th")
STUDENTS = (*(f"reviews-size-{form}-0" for form in FORMS), "reviews-kd-0")


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Begun in this process; a process of its own, with one more for the command, does what is missing."""
    root = tmp_path_factory.mktemp("size")
    with pytest.MonkeyPatch.context() as monkeypatch:
        programs_inside(monkeypatch)
        run_size(tiny_run, root)
    assert not (root / STUDENTS[-1]).exists()
    run_size(tiny_run, root, "kd")
    return root


def run_size(tiny_run: TinyRun, root: Path, *references: str) -> None:
    where = ["--recipe", str(tiny_run.recipe_file), "--teachers", str(tiny_run.teachers), "--runs", str(root)]
    program(["run", *where, "--seeds", "0", "--unseen", "8", "--references", *references, "--forms", *FORMS])


def program(words: list[str]) -> None:
    done = subprocess.run([sys.executable, str(SIZE), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def form(runs: Path, name: str) -> Cache:
    return open_cache(runs / f"reviews-size-{name}" / "cache")


def states(cache: Cache, teacher: str, layer: int) -> np.ndarray:
    parts = [part.name for part in cache.parts if part.scope == "full"]
    return np.concatenate([cache.hidden(teacher, part, layer).values for part in parts])


def test_a_form_holds_what_a_dump_would_have_stored(runs: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    coded = [
        "dump.projection=pca",
        "dump.dtype=coded",
        "dump.bytes=4",
        "teachers.roberta.per_layer={ all = { bytes = 6 } }",
    ]
    dump_teachers(tiny_run.recipe(*coded), tiny_run.teachers, tmp_path / "live", progress=SilentProgress())
    live = open_cache(tmp_path / "live")
    for name, spec in live.teachers.items():
        for part in live.parts:
            assert np.array_equal(
                form(runs, "trellis-8th").outputs(name, part.name).logits, live.outputs(name, part.name).logits
            )
        for layer in spec.layers:
            exact = states(open_cache(tiny_run.exact), name, layer)
            assert np.array_equal(states(form(runs, "float16"), name, layer), exact.astype(np.float16))
            # padding in the pass that fits bases is another, so a few rows at a border fall to the other side
            same = (states(form(runs, "trellis-8th"), name, layer) == states(live, name, layer)).all(axis=1)
            assert same.mean() > 0.95, (name, layer, same.mean())


def test_product_quantisation_has_its_centroids_and_no_more(runs: Path, tiny_run: TinyRun) -> None:
    for name, spec in open_cache(tiny_run.exact).teachers.items():
        layer = max(spec.layers)
        exact, rebuilt = (
            states(cache, name, layer) for cache in (open_cache(tiny_run.exact), form(runs, "product-8th"))
        )
        assert len(np.unique(exact[:, :4], axis=0)) > 256 >= len(np.unique(rebuilt[:, :4], axis=0))
        assert np.square(exact - rebuilt).sum() < 0.5 * np.square(exact - exact.mean(axis=0)).sum()


def test_another_run_does_nothing_and_the_page_tells_of_every_form(
    runs: Path, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs_inside(monkeypatch)
    before = {name: (runs / name / "results.json").stat().st_mtime_ns for name in STUDENTS}
    run_size(tiny_run, runs, "kd")
    assert {name: (runs / name / "results.json").stat().st_mtime_ns for name in STUDENTS} == before
    program(["collect", "reviews", "--runs", str(runs), "--to", str(tmp_path)])
    text = (tmp_path / "accuracy-against-bytes-table.md").read_text()
    measured = {
        name: json.loads((runs / f"reviews-size-{name}" / "measured.json").read_text())["layers"] for name in FORMS
    }
    kept = {name: np.mean([layer["kept"] for layer in layers]) for name, layers in measured.items()}
    assert 0.999 < kept["float16"] <= 1 and 0 < kept["trellis-8th"] < 1 and 0 < kept["product-8th"] < 1
    for name, title in (("trellis-8th", "trellis, 1/8"), ("product-8th", "product quantisation, 1/8")):
        accuracy = json.loads((runs / f"reviews-size-{name}-0" / "results.json").read_text())["scores"]["test"][
            "accuracy"
        ]
        row = next(line for line in text.splitlines() if line.startswith(f"| {title}"))
        assert f"{kept[name]:.3f}" in row and f"{accuracy:.4f}" in row
    ElementTree.parse(tmp_path / "accuracy-against-bytes.svg")
