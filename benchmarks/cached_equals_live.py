"""Compares cached with live targets on real teachers: every loss term of every step of one epoch.

    python benchmarks/cached_equals_live.py RECIPE --teachers DIR --rows 512 [--set KEY=VALUE ...]

Two caches of the recipe's first rows are dumped, and a student is distilled from each and from the same teachers run
live. The first cache is float32 without projection: the losses must be equal up to rounding. The second has the
recipe's projection and dtype: live targets use the same basis, so the difference is quantisation. The student has no
dropout. Plain SGD changes the weights, so a difference in one step would affect the next one. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from small import first_rows

from kdcache.distill.setup import prepare
from kdcache.distill.stage import DistillTask
from kdcache.dump.stage import dump_teachers
from kdcache.progress import RichProgress, SilentProgress
from kdcache.recipe import Recipe, load_recipe
from kdcache.training.best_epoch import BestEpoch

EXACT = ['dump.projection="none"', 'dump.dtype="float32"']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--teachers", type=Path, required=True, help="directory of the co-finetuned teachers")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    report: dict[str, object] = {"rows": arguments.rows, "torch": torch.__version__, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        overrides = [*arguments.overrides, "distill.dropout=0.0"]
        for label, more in (("none, float32", EXACT), ("as in the recipe", [])):
            recipe = first_rows(load_recipe(arguments.recipe, [*overrides, *more]), arguments.rows, place / "train.tsv")
            cache = place / label.replace(", ", "-").replace(" ", "-")
            dump_teachers(recipe, arguments.teachers, cache, progress=RichProgress())
            report[label] = compare(recipe, arguments.teachers, cache, place)
    json.dump(report, sys.stdout, indent=2)
    print()


def compare(recipe: Recipe, teachers: Path, cache: Path, place: Path) -> dict[str, object]:
    """Largest and median relative difference of each term over the steps of an epoch."""
    cached = list(losses(recipe, cache, None, place))
    live = list(losses(recipe, cache, teachers, place))
    assert len(cached) == len(live)
    found: dict[str, object] = {"steps": len(cached)}
    for term in cached[0]:
        relative = sorted(
            abs(ours[term] - theirs[term]) / abs(theirs[term]) for ours, theirs in zip(cached, live, strict=True)
        )
        found[term] = {
            "max": f"{relative[-1]:.1e}",
            "median": f"{relative[len(relative) // 2]:.1e}",
            "first": round(live[0][term], 5),
        }
    return found


def losses(recipe: Recipe, cache: Path, live: Path | None, place: Path) -> Iterator[dict[str, float]]:
    """Every loss term of every step; each is followed by a step of plain SGD."""
    training = prepare(recipe, cache, place, live, SilentProgress())
    model = training.model().train()
    task = DistillTask(model, training.source, None, BestEpoch(place, place, {}), epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in task.batches(0, 0):
        for loss, terms in task.losses(batch):
            loss.backward()
            yield {"loss": loss.item(), **{name: torch.as_tensor(value).item() for name, value in terms.items()}}
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
