"""Compares co-finetuning with training the same teachers one after the other: seconds and peak memory.

    python benchmarks/cofinetune.py quickstart/quickstart.toml --rows 256

The stage itself runs, including checkpoints and saving, for one epoch over the recipe's first training rows: with all
teachers, and with each one alone. Each run has its own process, and runs are interleaved. Co-finetuning should take the
sum of the times, since the work is the same. Its memory should hold all weights with their moments, and the activations
of one teacher. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import in_a_process, machine, peak_memory_mb, summary
from small import first_rows

from kdcache.recipe import Recipe, load_recipe

TOGETHER = "together"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.alone:
        json.dump(train(recipe, arguments.alone, arguments.rows), sys.stdout)
        return
    settings = [word for override in arguments.overrides for word in ("--set", override)]
    common = [arguments.recipe, "--rows", str(arguments.rows), *settings]
    names = [TOGETHER, *(teacher.name for teacher in recipe.teachers)]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            turns[name].append(in_a_process("cofinetune.py", [*common, "--alone", name]))
    alone = [name for name in names if name != TOGETHER]
    ratios = [
        both["seconds"] / sum(turns[name][number]["seconds"] for name in alone)
        for number, both in enumerate(turns[TOGETHER])
    ]
    report: dict[str, Any] = {"machine": machine(), "recipe": arguments.recipe, "rows": arguments.rows}
    report |= {name: {key: summary([turn[key] for turn in found]) for key in found[0]} for name, found in turns.items()}
    report["seconds together / sum of seconds alone"] = summary(ratios)
    json.dump(report, sys.stdout, indent=2)
    print()


def train(recipe: Recipe, which: str, rows: int) -> dict[str, float]:
    """Co-finetune for one epoch; memory is measured beyond that of the libraries."""
    from kdcache.progress import SilentProgress
    from kdcache.teachers.cofinetune import cofinetune

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        small = first_rows(one_epoch(recipe, which), rows, place / "train.tsv")
        before = peak_memory_mb()
        began = time.perf_counter()
        cofinetune(small, place / "teachers", place / "work", progress=SilentProgress())
        return {"seconds": time.perf_counter() - began, "peak memory, MB": peak_memory_mb() - before}


def one_epoch(recipe: Recipe, which: str) -> Recipe:
    """The recipe with one teacher or all, trained for one epoch."""
    teachers = [teacher for teacher in recipe.teachers if which in (TOGETHER, teacher.name)]
    return recipe.model_copy(
        update={"teachers": teachers, "cofinetune": recipe.cofinetune.model_copy(update={"epochs": 1})}
    )


if __name__ == "__main__":
    main()
