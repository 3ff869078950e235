"""Runs all speed measurements one after the other, and writes their page.

    python benchmarks/all.py             # real text and the quickstart's two real teachers; under an hour on two cores
    python benchmarks/all.py --quick     # the same programs with minimal input: minutes; the figures mean nothing
    python benchmarks/all.py --page      # only write docs/benchmarks.md again from the measurements

Without ``--recipe`` the quickstart is prepared (this needs only a package index), and its teachers are trained for one
short epoch: speed does not depend on what they learned. ``--recipe``, ``--teachers`` and ``--cache`` measure another
run. The output of each program is stored as JSON in benchmarks/measured/. A measurement with a file there is skipped,
so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import page

HERE = Path(__file__).resolve().parent
SHORT = ("cofinetune.epochs=1", "distill.epochs=1")


@dataclass(frozen=True)
class Measurement:
    """A program with its usual and its quick arguments. ``where``: which of RECIPE, TEACHERS, CACHE it gets."""

    script: str
    usual: str
    quick: str
    where: tuple[str, ...] = ()


MEASUREMENTS: Mapping[str, Measurement] = {
    "steps": Measurement(
        "steps.py", "--steps 20 --rounds 7", "--steps 1 --rounds 2 --counts 2", ("recipe", "teachers", "cache")
    ),
    "dump": Measurement(
        "dump.py", "--texts 2048 --rounds 5", "--texts 16 --rounds 2 --backends torch", ("recipe", "teachers")
    ),
    "cofinetune": Measurement("cofinetune.py", "--rows 192 --rounds 3", "--rows 8 --rounds 1", ("recipe",)),
    "freed": Measurement(
        "freed.py",
        "--steps 20 --rounds 5",
        "--trainings fine-tune --steps 1 --rounds 1",
        ("recipe", "teachers", "cache"),
    ),
    "scale": Measurement("scale.py", "--rows 10000 100000 1000000", "--rows 200 400 --steps 4 --repeats 1"),
    "loader-float16": Measurement(
        "rivals.py", "--dtype float16", "--dtype float16 --rows 256 --rounds 1 --workers 0 --seconds 0.01"
    ),
    "loader-int8": Measurement(
        "rivals.py", "--dtype int8", "--dtype int8 --rows 256 --rounds 1 --workers 0 --seconds 0.01"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument(
        "--recipe", help="of a run whose teachers and cache are there; the quickstart's where not given"
    )
    parser.add_argument("--teachers", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rivals-python", default=sys.executable, help="interpreter of benchmarks/requirements.txt")
    parser.add_argument("--measured", type=Path, default=HERE / "measured", help="where the JSON is kept")
    parser.add_argument("--to", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    arguments = parser.parse_args()
    if not arguments.page:
        arguments.measured.mkdir(parents=True, exist_ok=True)
        given = {"recipe": arguments.recipe, "teachers": arguments.teachers, "cache": arguments.cache}
        places = {key: str(value) for key, value in given.items()}
        if not arguments.recipe and any(MEASUREMENTS[name].where for name in arguments.only):
            places = quickstart()
        for name in arguments.only:
            measure(name, places, arguments)
    page.write(arguments.measured, arguments.to)
    print(arguments.to)


def quickstart() -> dict[str, str]:
    """Make the quickstart's inputs, teachers of one epoch and their cache, unless they exist."""
    root = Path("runs/benchmarks")
    if not (root / "cache" / "manifest.json").exists():
        kdcache("pipelines prepare quickstart")
        settings = " ".join(f"--set {shlex.quote(one)}" for one in (*SHORT, 'name="benchmarks"'))
        kdcache(f"cofinetune quickstart/quickstart.toml {settings}")
        kdcache(f"dump-teachers quickstart/quickstart.toml {settings}")
    return {"recipe": "quickstart/quickstart.toml", "teachers": str(root / "teachers"), "cache": str(root / "cache")}


def kdcache(words: str) -> None:
    print(f"$ kdcache {words}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "kdcache", *shlex.split(words)], check=True)


def measure(name: str, places: dict[str, str], arguments: argparse.Namespace) -> None:
    """Run one program in its own process, and store its output."""
    target, one = arguments.measured / f"{name}.json", MEASUREMENTS[name]
    if target.exists():
        print(f"measured already: {target}", file=sys.stderr)
        return
    words = shlex.split(one.quick if arguments.quick else one.usual)
    for key in one.where:
        words = [places[key], *words] if key == "recipe" else [*words, f"--{key}", places[key]]
    if one.script == "rivals.py":
        words += ["--rivals-python", arguments.rivals_python]
    if "recipe" in one.where:
        words += [word for override in arguments.overrides for word in ("--set", override)]
    print(f"$ python benchmarks/{one.script} {shlex.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, str(HERE / one.script), *words], stdout=subprocess.PIPE, text=True, check=True
    )
    command = f"python benchmarks/{one.script} {shlex.join(words)}"
    target.write_text(json.dumps({"command": command, **json.loads(done.stdout)}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
