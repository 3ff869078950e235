"""The speed programs run, on as little as possible, and the page is made from what they print.

Nothing is said about time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TinyRun

pytestmark = pytest.mark.timeout(900)  # a chain of processes: minutes on a busy machine
ALL = Path(__file__).parents[2] / "benchmarks" / "all.py"


@pytest.mark.parametrize("name", ["steps", "dump", "freed", "scale", "loader-int8"])
def test_quick(name: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    places = [
        "--recipe",
        str(tiny_run.recipe_file),
        "--teachers",
        str(tiny_run.teachers),
        "--cache",
        str(tiny_run.cache),
    ]
    target = tmp_path / "benchmarks.md"
    command = [
        sys.executable,
        str(ALL),
        "--quick",
        "--only",
        name,
        *places,
        "--measured",
        str(tmp_path),
        "--to",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert "## " in target.read_text()
    if name == "steps":
        found = report["2 teachers"]
        assert set(found["steps per second"]) == {"fine-tune", "cached", "memory", "logits only", "live"}
        assert 0 < found["ideal cached / fine-tune by FLOPs"] < 1
        assert all(abs(sum(shares.values()) - 1) < 0.01 for shares in found["share of time"].values())
    if name == "loader-int8":
        assert report["memory"]["kdcache"]["parts per batch"]["median"] > 1
