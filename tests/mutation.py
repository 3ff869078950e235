"""Changes one line at a time and looks whether a test notices: ``make mutants``, or for some modules, as below.

    make mutants
    python tests/mutation.py kdcache/files.py kdcache/share/gc.py
    python tests/mutation.py kdcache/training/loop.py --only '*save__*'     # mutants of one function

``tests/mutation.toml`` says which tests each module is held to. mutmut changes a copy of the checkout and runs, for
each mutant, the tests that reach the changed function, in a child that is forked after the imports. Prints the score
and the diff of each survivor; docs/mutation.md keeps the scores, and the survivors that no test can tell from the
original. Ends with 1 where a score is below 0.85.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LEAST = 0.85
KILLED = {"killed", "timeout", "segfault", "caught by type check"}


def main() -> int:
    """Score the modules that are named, or all."""
    known: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description="Mutation score of modules.")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"one of: {', '.join(known)}")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR and leave it there, for `mutmut browse`")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="GLOB", help="mutants with these names, as mutmut has it"
    )
    options = parser.parse_args()
    if unknown := set(options.modules) - known.keys():
        parser.error(f"not in mutation.toml: {', '.join(sorted(unknown))}")
    worst = 1.0
    for module in options.modules or known:
        with tempfile.TemporaryDirectory(prefix="kdcache-mutants-") as temporary:
            place = (options.keep or Path(temporary)) / module.replace("/", ".")
            worst = min(worst, score(module, known[module], place, options.only))
    return 0 if worst >= LEAST else 1


def score(module: str, entry: dict[str, Any], place: Path, only: Sequence[str] = ()) -> float:
    """The share of the mutants of ``module``, or of those named by ``only``, that its tests notice; prints it with the
    survivors.
    """
    shutil.rmtree(place, ignore_errors=True)
    for name in ("kdcache", "tests", "pipelines"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (place / "pyproject.toml").write_text(settings + _settings(module, entry), encoding="utf-8")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def mutmut(*arguments: str, check: bool = False) -> str:
        command = [sys.executable, "-m", "mutmut", *arguments]
        done = subprocess.run(command, cwd=place, env=environment, text=True, capture_output=True, check=False)
        if check and done.returncode:
            raise SystemExit(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        return done.stdout

    mutmut("run", "--max-children", os.environ.get("WORKERS", "1"), *only, check=True)
    lines = [line.strip() for line in mutmut("results", "--all", "true").splitlines() if ": " in line]
    results = {
        name: said for name, _, said in (line.rpartition(": ") for line in lines) if not only or said != "not checked"
    }
    counts = Counter(results.values())
    killed = sum(count for said, count in counts.items() if said in KILLED)
    found = killed / max(1, len(results))
    print(f"{module}: {killed} of {len(results)} mutants noticed, score {found:.3f} ({dict(counts)})", flush=True)
    for name, said in results.items():
        if said not in KILLED:
            print(f"\n# {said}\n{mutmut('show', name)}", flush=True)
    return found


def _settings(module: str, entry: dict[str, Any]) -> str:
    without = ["-k", f"not ({entry['without']})"] if "without" in entry else []
    lines = {
        "source_paths": ["kdcache"],
        "only_mutate": [module],
        "also_copy": ["pipelines"],
        "pytest_add_cli_args_test_selection": entry["tests"],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-p", "no:randomly", "-x", *without],
        "do_not_mutate_patterns": [],
    }
    return "\n[tool.mutmut]\n" + "".join(f"{key} = {value!r}\n" for key, value in lines.items())


if __name__ == "__main__":
    sys.exit(main())
