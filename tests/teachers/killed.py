"""Runs co-finetunings in forked children that are killed again and again, and prints what became of them.

    python tests/teachers/killed.py RECIPE ROOT PLANS

PLANS is a JSON object: the name of a directory below ROOT -> the list of points at which one child after the other is killed there:
``step:N`` (SIGKILL in its optimizer step N), ``save:N`` and ``saved:N`` (before and after its N-th checkpoint or best-epoch write), ``disk:N``
(before its N-th system step of writing), ``after:S`` (S seconds after its start, from outside), ``end`` (none). Prints a JSON
object: the exit statuses by name; 0 is a run that came to its end.

One process imports everything, and runs once undisturbed, into ROOT/whole; children are forked from it, so each costs a fraction
of a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.cache import files
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe, load_recipe
from kdcache.teachers.cofinetune import cofinetune
from kdcache.teachers.trainee import JointTrainee
from kdcache.training import checkpoints


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function: Callable[..., Any], at: int, *, after: bool = False) -> Callable[..., Any]:
    """``function``, but its ``at``-th call is the last thing that the process does."""
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            die()
        result = function(*args, **kwargs)
        if calls == at:
            die()
        return result

    return called


def arm(kind: str, number: str) -> None:
    if kind == "step":
        JointTrainee.losses = dying(JointTrainee.losses, int(number))  # type: ignore[method-assign]
    elif kind in ("save", "saved"):
        checkpoints.save = dying(checkpoints.save, int(number), after=kind == "saved")
    elif kind == "disk":
        step = dying(lambda: None, int(number))
        for name in ("write", "fsync", "rename", "fsync_directory"):
            original = getattr(files.disk, name)
            setattr(files.disk, name, lambda *args, original=original: (step(), original(*args))[1])


def run_child(recipe: Recipe, root: Path, point: str) -> int:
    kind, _, number = point.partition(":")
    child = os.fork()
    if child == 0:
        arm(kind, number)
        cofinetune(recipe, root / "teachers", root / "work", progress=SilentProgress())
        os._exit(0)
    if kind == "after":
        time.sleep(float(number))
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main(recipe_file: str, root: str, plans: str) -> None:
    recipe = load_recipe(recipe_file)
    whole = Path(root) / "whole"
    cofinetune(recipe, whole / "teachers", whole / "work", progress=SilentProgress())
    print(
        json.dumps(
            {name: [run_child(recipe, Path(root) / name, point) for point in plan] for name, plan in json.loads(plans).items()}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
