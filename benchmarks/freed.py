"""Measures a student's training on the CPU with freed memory kept in the process: speed and memory.

    python benchmarks/freed.py RECIPE --teachers runs/sst2/teachers --cache runs/sst2/cache --set KEY=VALUE ...

See docs/decisions/0016-freed-memory.md. Steps of plain fine-tuning and of ``mt-bert`` from the cache run in separate,
interleaved processes: `kept` as kdcache distils, and `given back` with the default of the C library. kdcache changes
nothing if the environment configures malloc; here it sets the value that glibc has by default. Prints JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from measure import in_a_process, machine, ratio, summary

WAYS: Mapping[str, Mapping[str, str]] = {"kept": {}, "given back": {"MALLOC_ARENA_TEST_": "8"}}
TRAININGS = ("fine-tune", "cached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--teachers", required=True, help="directory of the co-finetuned teachers")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--trainings", nargs="*", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    settings = [word for override in arguments.overrides for word in ("--set", override)]
    common = [arguments.recipe, "--teachers", arguments.teachers, "--cache", arguments.cache, *settings, "--steps"]
    report: dict[str, Any] = {"machine": machine(), "recipe": arguments.recipe}
    for name in arguments.trainings:
        training = functools.partial(in_a_process, "steps.py", [*common, str(arguments.steps), "--alone", name])
        report[name] = compare(training, arguments.rounds)
    json.dump(report, sys.stdout, indent=2)
    print()


def compare(training: Callable[..., dict[str, Any]], count: int) -> dict[str, Any]:
    """The report of a training in both ways, and the ratios of kept to given back."""
    turns: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(count):
        for way in sorted(WAYS, reverse=number % 2 == 1):
            turns[way].append(training(environment=WAYS[way]))
    keys = [key for key, value in turns["kept"][0].items() if value]
    found: dict[str, Any] = {
        way: {key: summary([turn[key] for turn in said]) for key in keys} for way, said in turns.items()
    }
    columns = {way: {key: [turn[key] for turn in said] for key in keys} for way, said in turns.items()}
    return found | {"kept / given back": {key: ratio(columns["kept"][key], columns["given back"][key]) for key in keys}}


if __name__ == "__main__":
    main()
