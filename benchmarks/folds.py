"""Do out-of-fold teachers help on rows that have labels? The same students from two caches of the same teachers.

    python benchmarks/folds.py pipelines/mind-few.toml --folds 5                       # resumable; what is there stays
    python benchmarks/folds.py pipelines/rte.toml --folds 5 --methods kd mt-bert --seeds 0 1 2
    python benchmarks/folds.py pipelines/mind-few.toml --set 'data.transfer=[]'        # train texts alone: small caches

The caches differ in the logits of the train texts alone: of the teachers themselves, or of the bundles of the folds
that did not see them. Each step is a ``kdcache`` command and is printed first. Teachers and a cache that the run of the
recipe has already are used; the second cache is runs/NAME/out-of-fold. ``--rows train`` learns from train texts alone,
``--rows all`` from transfer texts too. The table compares the students by seed, on validation and test.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdcache.cache.card import folds_lines
from kdcache.cache.reader import open_cache
from kdcache.recipe import load_recipe
from kdcache.report.intervals import paired_difference

SPLITS = ("validation", "test")
KINDS = {"in-fold": "cache", "out-of-fold": "out-of-fold"}  # how students are named -> directory of their cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["kd", "mt-bert"])
    parser.add_argument("--rows", nargs="+", default=["train"], choices=("train", "all"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--metric", default="accuracy", choices=("accuracy", "macro_f1", "matthews", "loss"))
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    name = load_recipe(arguments.recipe, arguments.settings).name
    runs, common = arguments.output_dir, [str(arguments.recipe), "--output-dir", str(arguments.output_dir)]
    settings = _flags(arguments.settings)
    _run("cofinetune", *common, "--folds", str(arguments.folds), *settings)
    for kind, folder in KINDS.items():
        wanted = _flags([f"dump.out_of_fold={str(kind == 'out-of-fold').lower()}"])
        _run("dump-teachers", *common, "--cache", str(runs / name / folder), *settings, *wanted)
    found: dict[tuple[str, str], dict[str, dict[int, Any]]] = {}
    for method, rows, seed, kind in _students(arguments.methods, arguments.rows, arguments.seeds):
        student = f"{name}-{kind}-{method}-{rows}-s{seed}"
        own = [f"distill.method={method}", f"distill.rows={rows}", f"distill.seed={seed}", f'name="{student}"']
        cache = str(runs / name / KINDS[kind])
        _run("distill", *common, "--cache", cache, *settings, *_flags(own), done=runs / student / "results.json")
        results = json.loads((runs / student / "results.json").read_text(encoding="utf-8"))
        found.setdefault((method, rows), {}).setdefault(kind, {})[seed] = results["scores"]
    for line in folds_lines(_facts(runs / name / "out-of-fold")):
        print(line)
    print(table(found, arguments.metric))


def _students(methods: Sequence[str], rows: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, str, int, str]]:
    """Seed by seed, so that an interrupted run has pairs."""
    for seed in seeds:
        for method in methods:
            for learned in rows:
                for kind in KINDS:
                    yield method, learned, seed, kind


def table(found: dict[tuple[str, str], dict[str, dict[int, Any]]], metric: str) -> str:
    """Means over seeds in both caches, and the difference with its 95 % interval over seeds."""
    lines = [
        f"| method | rows | split | seeds | in-fold {metric} | out-of-fold | difference | 95 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (method, rows), by_kind in found.items():
        for split in SPLITS:
            ours, theirs = (
                {seed: scores[split][metric] for seed, scores in by_kind[kind].items() if split in scores}
                for kind in ("out-of-fold", "in-fold")
            )
            difference = paired_difference(ours, theirs)
            if difference is None:
                continue
            interval = "" if difference.low is None else f"{difference.low:+.4f} to {difference.high:+.4f}"
            means = [f"{statistics.fmean(scores.values()):.4f}" for scores in (theirs, ours)]
            cells = [method, rows, split, str(len(ours)), *means, f"{difference.mean:+.4f}", interval]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _facts(cache: Path) -> dict[str, Any]:
    from kdcache.cache.card import describe

    return describe(open_cache(cache))


def _flags(settings: Sequence[str]) -> list[str]:
    return [argument for setting in settings for argument in ("--set", setting)]


def _run(*arguments: str, done: Path | None = None) -> None:
    """Print and run a command of kdcache, unless ``done`` exists."""
    command = [sys.executable, "-m", "kdcache", *arguments]
    print(f"$ kdcache {shlex.join(arguments)}", flush=True)
    if done is None or not done.exists():
        subprocess.run(command, check=True, env=dict(os.environ), stdout=sys.stderr)


if __name__ == "__main__":
    main()
