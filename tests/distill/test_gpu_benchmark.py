"""The programs for a GPU, on as little as possible and on the CPU: they run, continue, and fill their page."""

from __future__ import annotations

import argparse
import importlib
import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TinyRun
from tests.distill.inside import programs_inside

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return Path(shutil.copyfile(ROOT / "docs" / "gpu.md", tmp_path / "gpu.md"))


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("pieces")


def _run(script: str, *words: object) -> None:
    before = sys.argv, list(sys.path)
    sys.argv, sys.path = [script, *map(str, words)], [str(BENCHMARKS), *sys.path]
    try:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    finally:
        sys.argv, sys.path = before


def _names(results: Path) -> list[str]:
    return [json.loads(line)["piece"] for line in results.read_text().splitlines()]


def test_every_piece_runs_once_and_the_page_has_its_tables(
    tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs_inside(monkeypatch)
    monkeypatch.setattr("kdcache.training.compiled._BACKEND", "eager")  # graphs that run as they are
    results = tmp_path / "gpu.jsonl"
    words = ("--quick", "--work", tmp_path / "work", "--results", results, "--to", page, "--minutes", 60)
    _run("gpu.py", *words)
    assert _names(results) == [
        "material", "teachers", "cache", "steps, 2 layers", "dump, torch, bf16, int8",
        "dump, torch, bf16, int8, compiled", "cofinetune",
    ]  # fmt: skip
    written = page.read_text()
    for title in (
        "A step of a student with 2 layers",
        "The dump of one teacher",
        "The cost of several",
        "Co-finetuning",
    ):
        assert f"### {title}" in written
    assert all(
        f"| {contender} |" in written for contender in ("fine-tune", "memory", "cached", "live", "cached / live")
    )
    assert "Nothing has been measured" not in written
    assert written.startswith("# On a GPU") and "Nothing has been run yet" in written
    assert str(ROOT) not in results.read_text().replace(str(tmp_path), "")
    capsys.readouterr()
    _run("gpu.py", *words)  # nothing is run again
    assert len(_names(results)) == 7
    assert page.read_text() == written
    assert capsys.readouterr().out == f"{page}\n"


def _piece(pieces: Any, name: str, code: str, makes: Path | None = None) -> Any:
    return pieces.Piece(name, [sys.executable, "-c", code], makes=makes)


def _given(results: Path, minutes: float = 1.0, only: list[str] | None = None) -> argparse.Namespace:
    return argparse.Namespace(results=results, minutes=minutes, only=only)


def test_pieces_continue_where_a_call_ended(
    pieces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, there = tmp_path / "results.jsonl", tmp_path / "there"
    slow = _piece(pieces, "slow", "import time; time.sleep(60)")
    assert pieces.run([slow, slow], _given(results, minutes=0.01)) == 2  # it and what comes after it
    assert _names(results) == ["slow"]
    programs_inside(monkeypatch)  # the rest needs no clock
    one = _piece(pieces, "one", f"open({str(there)!r}, 'w').close(); print('{{\"n\": 1}}')", there)
    quick = _piece(pieces, "slow", "print('{\"n\": 2}')")
    assert pieces.run([one, quick], _given(results)) == 0
    assert {name: entry["found"]["n"] for name, entry in pieces.known(results).items()} == {"one": 1, "slow": 2}
    assert pieces.known(results)["slow"]["seconds"] >= 0.6  # of both calls
    before = len(_names(results))
    assert pieces.run([one, quick], _given(results)) == 0
    assert len(_names(results)) == before
    there.unlink()  # a fresh machine
    assert pieces.run([one, quick], _given(results)) == 0
    assert there.exists() and len(_names(results)) == before + 1
    with results.open("a") as file:
        file.write('{"piece": "three", "fou')  # the machine was taken away
    three = _piece(pieces, "three", "print('{\"n\": 3}')")
    assert pieces.run([three], _given(results, only=["thr"])) == 0
    assert pieces.known(results)["three"]["found"] == {"n": 3}
    assert "/" not in pieces.known(results)["three"]["command"].replace("python", "")
    with pytest.raises(SystemExit, match="bad failed with exit code"):
        pieces.run([_piece(pieces, "bad", "raise SystemExit(3)")], _given(results))
    capsys.readouterr()


def test_full_data_sets(tiny_run: TinyRun, tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs_inside(monkeypatch)
    results = tmp_path / "full.jsonl"
    data = tiny_run.recipe_file.parent
    splits = [word for name in ("train", "dev", "test") for word in (f"--{name}", data / f"{name}.tsv")]
    splits[2] = "--validation"
    _run(
        "full.py", tiny_run.recipe_file, "--name", "tiny", *splits, "--set", "data.transfer=[]",
        "--methods", "kd", "mt-bert", "--seeds", 0,
        "--output-dir", tmp_path / "runs", "--results", results, "--to", page, "--minutes", 60,
    )  # fmt: skip
    assert _names(results) == ["tiny: teachers", "tiny: cache", "tiny: kd, seed 0", "tiny: mt-bert, seed 0"]
    found = json.loads((tmp_path / "runs" / "tiny-kd-0" / "results.json").read_text())
    accuracy = found["scores"]["test"]["accuracy"]
    assert f"| tiny | kd | {accuracy:.4f} | 1 |" in page.read_text()


def test_the_time_in_which_a_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    busy = importlib.import_module("steps").busy
    assert busy([]) == 0
    assert busy([(0, 2), (5, 6), (1, 3), (5.5, 5.75)]) == 4
