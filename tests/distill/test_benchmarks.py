"""The speed programs run, on as little as possible, and the page is made from what they print.

Nothing is said about time. All but one run in this process; that one runs as a user starts it, and so do the processes
that it starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TinyRun
from tests.distill.inside import programs_inside

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def quick(name: str, run: TinyRun, root: Path) -> Any:
    """What ``all.py --quick`` measures."""
    places = ["--recipe", str(run.recipe_file), "--teachers", str(run.teachers), "--cache", str(run.cache)]
    target = root / "benchmarks.md"
    kept = ["--measured", str(root), "--to", str(target)]
    command = [sys.executable, str(BENCHMARKS / "all.py"), "--quick", "--only", name, *places, *kept]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "## " in target.read_text()
    return json.loads((root / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["steps", "dump", "freed", "loader-int8"])
def test_quick(name: str, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs_inside(monkeypatch)
    report = quick(name, tiny_run, tmp_path)
    if name == "steps":
        found = report["2 teachers"]
        contenders = {"fine-tune", "cached", "memory", "logits only", "live"}
        assert set(found["steps per second"]) == contenders == set(found["peak memory, MB"])
        assert 0 < found["ideal cached / fine-tune by FLOPs"] < 1
        assert all(abs(sum(shares.values()) - 1) < 0.01 for shares in found["share of time"].values())
    if name == "freed":
        assert set(report["fine-tune"]) == {"kept", "given back", "kept / given back"}
    if name == "loader-int8":
        assert report["memory"]["kdcache"]["parts per batch"]["median"] > 1


def test_quick_in_processes_of_their_own(tiny_run: TinyRun, tmp_path: Path) -> None:
    report = quick("scale", tiny_run, tmp_path)
    assert report["400 rows"]["resident / that of fewer rows"] > 0


def test_a_contender_has_a_process_with_its_arguments_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import in_a_process

    script = tmp_path / "contender.py"
    script.write_text(
        "import json, os, sys\nprint('a library says this')\n"
        "print(json.dumps({'pid': os.getpid(), 'words': sys.argv[1:], 'more': os.environ['MORE'],"
        " 'home': os.environ['KDCACHE_HOME']}))\n"
    )
    found = in_a_process(str(script), ["--steps", "3"], environment={"MORE": "8"})
    assert found.pop("pid") != os.getpid()
    assert found == {"words": ["--steps", "3"], "more": "8", "home": os.environ["KDCACHE_HOME"]}
