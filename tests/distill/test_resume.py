"""Killed at any moment, the same command ends with the weights of an undisturbed run (CPU, float32)."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
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
DRIVER = Path(__file__).with_name("killed.py")


@pytest.fixture(scope="module")
def undisturbed(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    root = tmp_path_factory.mktemp("undisturbed")
    return distill(tiny_run.recipe(*OVERRIDES), tiny_run.cache, root, progress=SilentProgress())


@dataclass(frozen=True)
class Attempts:
    """A run directory, and how each process that worked on it ended."""

    root: Path
    statuses: list[int]


@pytest.fixture(scope="module")
def killed(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Attempts]:
    """Every attempt of every test, made by one process that imports torch only once."""
    rng = random.Random(3)
    points = {
        "steps": [*(f"step:{rng.randint(2, 5)}" for _ in range(5)), "end"],  # some get past a checkpoint, some start over
        "saves": ["save:1", "saved:1", "save:2", "saved:2", "save:3", "end"],  # of checkpoints and of the best epoch
        "disk": [*(f"disk:{rng.randint(3, 60)}" for _ in range(4)), "end"],
        "half": ["step:5"],
    }
    roots = {name: tmp_path_factory.mktemp(name) for name in points}
    attempts = json.dumps({str(roots[name]): found for name, found in points.items()})
    command = [sys.executable, str(DRIVER), str(tiny_run.recipe_file), str(tiny_run.cache), json.dumps(OVERRIDES), attempts]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=DRIVER.parent.parent.parent)
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout.splitlines()[-1])
    return {name: Attempts(root, statuses[str(root)]) for name, root in roots.items()}


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


def test_killed_at_five_random_steps(killed: dict[str, Attempts], undisturbed: DistillResult) -> None:
    assert killed["steps"].statuses == [signal.SIGKILL] * 5 + [0]
    assert_same(killed["steps"].root, undisturbed)


def test_killed_around_checkpoint_writes(killed: dict[str, Attempts], undisturbed: DistillResult) -> None:
    assert killed["saves"].statuses == [signal.SIGKILL] * 5 + [0]
    assert_same(killed["saves"].root, undisturbed)


def test_killed_at_system_steps_of_writing(killed: dict[str, Attempts], undisturbed: DistillResult) -> None:
    assert set(killed["disk"].statuses[:-1]) <= {signal.SIGKILL, 0}
    assert killed["disk"].statuses[-1] == 0
    found, expected = (
        load_file(place / "student" / "model.safetensors") for place in (killed["disk"].root, undisturbed.student.parent)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_training_does_not_go_on_from_here(tiny_run: TinyRun, killed: dict[str, Attempts]) -> None:
    root = killed["half"].root
    with pytest.raises(MismatchError, match=r"distill\.temperature: 1\.0 then, 2\.0 now") as caught:
        distill(tiny_run.recipe(*OVERRIDES, "distill.temperature=2.0"), tiny_run.cache, root, progress=SilentProgress())
    assert caught.value.exit_code == 4
    (state,) = (root / "checkpoints" / "distill").glob("step-*/model.pt")
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(DamageError, match=r"model\.pt"):
        distill(tiny_run.recipe(*OVERRIDES), tiny_run.cache, root, progress=SilentProgress())
