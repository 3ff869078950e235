"""Killed at any moment, the same command ends with the weights of an undisturbed run (CPU, float32)."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.distill.stage import DistillResult, distill
from kdcache.errors import DamageError, MismatchError
from kdcache.progress import SilentProgress
from tests.distill.conftest import TinyRun

OVERRIDES = [
    "distill.epochs=2",
    "distill.checkpoint_steps=3",
]  # 16 steps; a checkpoint in the middle of each epoch, and at its end
STEPS = 16
DRIVER = Path(__file__).with_name("killed.py")


@pytest.fixture(scope="module")
def undisturbed(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    root = tmp_path_factory.mktemp("undisturbed")
    return distill(tiny_run.recipe(*OVERRIDES), tiny_run.cache, root, progress=SilentProgress())


def run_killed(run: TinyRun, root: Path, *points: str) -> list[int]:
    command = [sys.executable, str(DRIVER), str(run.recipe_file), str(run.cache), str(root), json.dumps(OVERRIDES), *points]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=DRIVER.parent.parent.parent)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def assert_same(root: Path, undisturbed: DistillResult) -> None:
    found, expected = (load_file(student / "model.safetensors") for student in (root / "student", undisturbed.student))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    results = json.loads((root / "results.json").read_text())
    assert results["scores"] == undisturbed.results["scores"]
    assert results["best_epoch"] == undisturbed.results["best_epoch"]
    assert metrics(root) == metrics(undisturbed.student.parent)


def metrics(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def test_killed_at_five_random_steps(tiny_run: TinyRun, undisturbed: DistillResult, tmp_path: Path) -> None:
    rng = random.Random(3)
    points = [f"step:{rng.randint(2, 5)}" for _ in range(5)]  # each run gets past a checkpoint or starts over
    statuses = run_killed(tiny_run, tmp_path, *points, "end")
    assert statuses == [signal.SIGKILL] * 5 + [0]
    assert_same(tmp_path, undisturbed)


def test_killed_around_every_checkpoint_write(tiny_run: TinyRun, undisturbed: DistillResult, tmp_path: Path) -> None:
    """Writes are those of checkpoints and of the best epoch; attempts begin where the one before left off."""
    points = ["save:1", "saved:1", "save:2", "saved:2", "save:3"]
    statuses = run_killed(tiny_run, tmp_path, *points, "end")
    assert statuses[0] == signal.SIGKILL
    assert statuses[-1] == 0
    assert_same(tmp_path, undisturbed)


def test_killed_at_system_steps_of_writing(tiny_run: TinyRun, undisturbed: DistillResult, tmp_path: Path) -> None:
    rng = random.Random(4)
    points = [f"disk:{rng.randint(3, 60)}" for _ in range(4)]
    statuses = run_killed(tiny_run, tmp_path, *points, "end")
    assert set(statuses[:-1]) <= {signal.SIGKILL, 0}
    assert statuses[-1] == 0
    found, expected = (load_file(student / "model.safetensors") for student in (tmp_path / "student", undisturbed.student))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_training_does_not_go_on_from_here(tiny_run: TinyRun, tmp_path: Path) -> None:
    assert run_killed(tiny_run, tmp_path, "step:5") == [signal.SIGKILL]
    with pytest.raises(MismatchError, match=r"distill\.temperature: 1\.0 then, 2\.0 now") as caught:
        distill(tiny_run.recipe(*OVERRIDES, "distill.temperature=2.0"), tiny_run.cache, tmp_path, progress=SilentProgress())
    assert caught.value.exit_code == 4
    (state,) = (tmp_path / "checkpoints" / "distill").glob("step-*/model.pt")
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(DamageError, match=r"model\.pt"):
        distill(tiny_run.recipe(*OVERRIDES), tiny_run.cache, tmp_path, progress=SilentProgress())
