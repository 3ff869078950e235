"""Full data sets on a GPU, in pieces: teachers, their cache, and a student for each method and seed.

    python benchmarks/full.py pipelines/sst2.toml --name sst2-full --train DATA/train.tsv --validation DATA/dev.tsv
        --teacher mpnet=MODELS/mpnet --teacher roberta=MODELS/roberta --student MODELS/minilm --set 'data.transfer=[]'
    python benchmarks/full.py pipelines/mind.toml --name mind-full --train DATA/train.tsv ...

Give the paths of the data and of the models where they are; what is not given is as in the recipe. Run the same command
again until it says that nothing is left: a call ends after ``--minutes``, and what is interrupted continues at its last
checkpoint. Each piece appends one line to ``--results``, and the table on the page is made from these.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pieces
from gpu_page import replace_between
from page import table
from pieces import HERE, Piece

METHODS, SEEDS = ("kd", "mt-bert"), (0, 1, 2)
DATA = ("train", "validation", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--name", required=True, help="of the runs; results of several names may share a file")
    for split in DATA:
        parser.add_argument(f"--{split}", metavar="FILE")
    parser.add_argument("--teacher", action="append", default=[], metavar="NAME=MODEL")
    parser.add_argument("--student", metavar="MODEL")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--to", type=Path, default=HERE.parent / "docs" / "gpu.md")
    pieces.arguments(parser, HERE / "measured" / "full.jsonl")
    given = parser.parse_args()
    left = 0 if given.page else pieces.run(planned(given), given)
    found = {name: entry["found"] for name, entry in pieces.known(given.results).items() if "found" in entry}
    replace_between(given.to, "full", section(found))
    print(f"{left} pieces are left: run the same command again" if left else given.to)


def planned(given: argparse.Namespace) -> list[Piece]:
    """Teachers, cache, then the students by seed: all methods of one seed come before the next seed."""
    run = given.output_dir / given.name
    made = [
        _stage(given, "teachers", "cofinetune", given.name, [], run / "teachers" / "teachers.json"),
        _stage(given, "cache", "dump-teachers", given.name, [], run / "cache" / "manifest.json"),
    ]
    for seed in given.seeds:
        for method in given.methods:
            name = f"{given.name}-{method}-{seed}"
            settings = [f"distill.method={method}", f"distill.seed={seed}"]
            words = ["--cache", str(run / "cache"), *_settings(settings)]
            made.append(_stage(given, f"{method}, seed {seed}", "distill", name, words))
    return made


def _stage(
    given: argparse.Namespace, what: str, command: str, name: str, words: list[str], makes: Path | None = None
) -> Piece:
    changes = [f"data.{split}={json.dumps(path)}" for split in DATA if (path := _absolute(getattr(given, split)))]
    for teacher in given.teacher:
        which, _, model = teacher.partition("=")
        changes.append(f"teachers.{which}.model={json.dumps(_absolute(model))}")
    if given.student:
        changes.append(f"student.init_from={json.dumps(_absolute(given.student))}")
    changes += [*given.overrides, f"name={json.dumps(name)}"]
    place = ["--output-dir", str(given.output_dir), "--json"]
    return Piece(
        f"{given.name}: {what}",
        [sys.executable, "-m", "kdcache", command, given.recipe, *words, *_settings(changes), *place],
        makes=makes,
    )


def _absolute(path: str | None) -> str | None:
    """A path on this machine in full, because a recipe's are relative to it; anything else is a name on the hub."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def _settings(changes: list[str]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def section(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One table: accuracy of the students of each name and method, over the seeds that are there."""
    scores: dict[tuple[str, str], list[float]] = {}
    for piece, values in found.items():
        name, _, what = piece.partition(": ")
        by_split = values.get("scores")
        if ", seed " in what and isinstance(by_split, Mapping):
            split = "test" if "test" in by_split else "validation"
            scores.setdefault((name, what.partition(", seed ")[0]), []).append(by_split[split]["accuracy"])
    rows = [[name, method, _spread(values), str(len(values))] for (name, method), values in sorted(scores.items())]
    if not rows:
        return "Nothing has been run yet.\n"
    return table(["run", "method", "accuracy of the student, ± standard deviation", "seeds"], rows)


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


if __name__ == "__main__":
    main()
