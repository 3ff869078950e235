"""Runs co-finetunings in children that are killed (``kdcache.testing.killing``), and prints what became of them.

    python tests/teachers/killed.py RECIPE ROOT PLANS

PLANS is a JSON object: the name of a directory below ROOT -> the list of points at which one child after the other is
killed there. Prints a JSON object: the exit statuses by name. One undisturbed run comes first, into ROOT/whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kdcache.progress import SilentProgress
from kdcache.recipe import load_recipe
from kdcache.teachers.cofinetune import cofinetune
from kdcache.teachers.joint import CofinetuneTask
from kdcache.testing.killing import run_child


def main(recipe_file: str, root: str, plans: str) -> None:
    recipe = load_recipe(recipe_file)

    def run(place: Path) -> None:
        cofinetune(recipe, place / "teachers", place / "work", progress=SilentProgress())

    def status(name: str, point: str) -> int:
        return run_child(lambda: run(Path(root) / name), CofinetuneTask, point)

    run(Path(root) / "whole")
    print(json.dumps({name: [status(name, point) for point in plan] for name, plan in json.loads(plans).items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
