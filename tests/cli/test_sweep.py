"""``kdcache sweep`` on the tiny task: its students are those of ``kdcache distill``, in one process or two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.cli import stages
from tests.cli.commands import Said, kdcache
from tests.conftest import TinyRun

GRID = 'sweep.grid={"distill.method"=["kd", "mt-bert"], "distill.weights.hidden"=[0.1, 1]}'
ALONE = 'sweep.baseline={"distill.method"="fine-tune"}'
DRIVER = Path(__file__).parent.parent / "distill" / "killed_sweep.py"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The number of threads decides how sums are rounded, so processes that are compared use one each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(run: TinyRun, output: Path, *settings: str, flags: tuple[object, ...] = ("--cache",)) -> Said:
    flags = ("--cache", run.cache) if flags == ("--cache",) else flags
    sets = [argument for setting in settings for argument in ("--set", setting)]
    return kdcache("sweep", run.recipe_file, "--output-dir", output, "--json", *flags, *sets)


@pytest.fixture(scope="module")
def swept(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    output = tmp_path_factory.mktemp("swept")
    said = call(tiny_run, output, GRID, ALONE, "sweep.seeds=[0, 1]")
    assert said.code == 0, said.err
    return output, said


def test_a_student_is_the_one_of_distill(tiny_run: TinyRun, swept: tuple[Path, Said], tmp_path: Path) -> None:
    output, said = swept
    found = next(cell for cell in said.document["cells"] if list(cell["settings"].values()) == ["mt-bert", 1.0])
    alone = kdcache(
        "distill", tiny_run.recipe_file, "--cache", tiny_run.cache, "--output-dir", tmp_path, "--json",
        "--set", "distill.weights.hidden=1.0", "--set", "distill.seed=1",
    )  # fmt: skip
    place = output / "reviews" / "sweep" / f"{found['cell']}-s1"
    ours, theirs = (load_file(root / "student" / "model.safetensors") for root in (place, tmp_path / "reviews"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert found["scores"]["1"] == alone.document["scores"]["validation"]["accuracy"]
    assert json.loads((place / "results.json").read_text())["teachers"].keys() == {"bert", "roberta", "xlm"}
    assert "epoch 1 of 1 done" in (place / "progress.log").read_text()


def test_the_document_says_what_the_students_cost(swept: tuple[Path, Said]) -> None:
    cost = swept[1].document["cost"]
    assert cost["students"] == 10
    assert cost["live_texts"] == 8 * 8 * 16  # eight students with teachers, 8 steps of 16 rows each
    assert cost["teacher_rates"].keys() == {"bert", "roberta", "xlm"}
    expected = sum(cost["live_texts"] / rate for rate in cost["teacher_rates"].values())
    assert cost["live_seconds"] == pytest.approx(expected)
    assert cost["dump_seconds"] > 0


def test_students_that_are_there_are_not_trained_again(
    tiny_run: TinyRun, swept: tuple[Path, Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished student was trained again")

    monkeypatch.setattr(stages, "distill", refuse)
    output, said = Path(shutil.copytree(swept[0], tmp_path / "copy")), swept[1]
    shutil.rmtree(next(output.rglob("student")))  # its scores are what a sweep needs
    reordered = 'sweep.grid={"distill.weights.hidden"=[1, 0.1], distill={method=["mt-bert", "kd"]}}'
    again = call(tiny_run, output, reordered, ALONE, "sweep.seeds=[1, 0]")
    assert again.code == 0, again.err
    by_name = {cell["cell"]: cell["mean"] for cell in said.document["cells"]}
    assert {cell["cell"]: cell["mean"] for cell in again.document["cells"]} == by_name
    shown = kdcache(
        "sweep", tiny_run.recipe_file, "--output-dir", output, "--show", "--cache", tiny_run.cache,
        "--set", GRID, "--set", "sweep.seeds=[0, 1, 2]",
    )  # fmt: skip
    assert "8 of 12 students are there, 0 failed" in shown.err
    assert "weights.hidden" in shown.out


def test_a_failing_cell_ends_with_1_and_the_others_are_there(tiny_run: TinyRun, tmp_path: Path) -> None:
    cells = 'sweep.cells=[{"distill.method"="kd"}, {"distill.teacher_layers"={bert=[1, 4]}}]'
    said = call(tiny_run, tmp_path, cells, "sweep.seeds=[0]")
    assert said.code == 1
    assert "1 of 2 students failed; the first is " in said.err
    good, bad = said.document["cells"]
    assert (good["seeds"], bad["seeds"]) == (1, 0)
    assert "no hidden states of layer 1" in bad["failed"]["0"]
    assert said.document["chosen"] == good["cell"]


def test_two_processes_train_the_same_students(tiny_run: TinyRun, swept: tuple[Path, Said], tmp_path: Path) -> None:
    part = 'sweep.grid={"distill.method"=["kd", "mt-bert"]}'
    flags = ("--cache", tiny_run.cache, "--jobs", "2", "--threads", "1")
    said = call(tiny_run, tmp_path, part, "sweep.seeds=[0, 1]", flags=flags)
    assert said.code == 0, said.err
    whole = {cell["cell"]: cell for cell in swept[1].document["cells"]}
    for cell in said.document["cells"]:
        assert cell["scores"] == whole[cell["cell"]]["scores"]
        for seed in (0, 1):
            place = Path("reviews", "sweep", f"{cell['cell']}-s{seed}", "student", "model.safetensors")
            ours, theirs = (load_file(output / place) for output in (tmp_path, swept[0]))
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_cells_with_caches_of_their_own(tiny_run: TinyRun, tmp_path: Path) -> None:
    caches = f'sweep.grid={{cache=["{tiny_run.cache}", "{tiny_run.exact}"]}}'
    said = call(tiny_run, tmp_path, caches, "sweep.seeds=[0]", flags=())
    assert said.code == 0, said.err
    identities = {
        json.loads((tmp_path / "reviews" / "sweep" / f"{cell['cell']}-s0" / "results.json").read_text())[
            "cache_identity"
        ]
        for cell in said.document["cells"]
    }
    assert len(identities) == 2
    missing = call(tiny_run, tmp_path, 'sweep.grid={cache=["not/there"]}', flags=())
    assert missing.code == 2
    assert "there is no directory 'not/there'" in missing.err


def test_a_cache_on_the_remote_is_one_version_during_the_whole_sweep(
    tiny_run: TinyRun, swept: tuple[Path, Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "remote").mkdir()
    monkeypatch.setenv("KDCACHE_REMOTE", str(tmp_path / "remote"))
    pushed = kdcache("cache", "push", tiny_run.cache, "--name", "reviews-3t")
    assert pushed.code == 0, pushed.err
    (tmp_path / "runs" / "reviews").mkdir(parents=True)
    (tmp_path / "runs" / "reviews" / "teachers").symlink_to(tiny_run.teachers)
    said = call(tiny_run, tmp_path / "runs", "sweep.cells=[{}]", "sweep.seeds=[0]", flags=("--cache", "reviews-3t"))
    assert said.code == 0, said.err
    (cell,) = said.document["cells"]
    same = next(other for other in swept[1].document["cells"] if other["cell"] == cell["cell"])
    assert cell["scores"]["0"] == same["scores"]["0"]
    assert said.document["cost"]["teacher_rates"].keys() == {"bert", "roberta", "xlm"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "has no [sweep] section"),
        (('sweep.grid={"dump.dim"=[4]}',), "'dump.dim' cannot vary in a sweep"),
        (('sweep.grid={"distill.method"=["kd"], "distill.epoch"=[1]}',), "unknown key 'distill.epoch'"),
        (('sweep.grid={"distill.method"=["mtbert"]}',), "no distillation method 'mtbert'"),
    ],
)
def test_what_is_refused_before_anything_is_trained(
    tiny_run: TinyRun, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    said = call(tiny_run, tmp_path, *settings)
    assert said.code == 2
    assert message in said.err
    assert not (tmp_path / "reviews").exists()


def test_a_sweep_that_is_killed_ends_with_the_same_table(tiny_run: TinyRun, tmp_path: Path) -> None:
    """A small form of: python tests/distill/killed_sweep.py."""
    command = [
        sys.executable, str(DRIVER), "--recipe", str(tiny_run.recipe_file), "--cache", str(tiny_run.cache),
        "--output", str(tmp_path), "--cells", "2", "--seeds", "2", "--kills", "3",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(DRIVER.parent.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["students"], report["killed"], report["same_table"]) == (4, 3, True)
