"""Runs a training again and again in forked children that kill themselves, and prints what became of it.

    python tests/distill/killed.py RECIPE CACHE ROOT OVERRIDES POINT...

One process imports everything once; each child gets one POINT: ``step:N`` (SIGKILL in optimizer step N), ``save:N`` and
``saved:N`` (before and after the N-th checkpoint write), ``disk:N`` (before the N-th system step of writing), ``end`` (none).
Children run one after the other on the same run directory. Prints a JSON list of their exit statuses.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.cache import files
from kdcache.distill.stage import distill
from kdcache.distill.trainee import DistillTrainee
from kdcache.progress import SilentProgress
from kdcache.recipe import load_recipe
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


def arm(point: str) -> None:
    kind, _, number = point.partition(":")
    if kind == "step":
        DistillTrainee.losses = dying(DistillTrainee.losses, int(number))  # type: ignore[method-assign]
    elif kind in ("save", "saved"):
        checkpoints.save = dying(checkpoints.save, int(number), after=kind == "saved")
    elif kind == "disk":
        step = dying(lambda: None, int(number))
        for name in ("write", "fsync", "rename", "fsync_directory"):
            original = getattr(files.disk, name)
            setattr(files.disk, name, lambda *args, original=original: (step(), original(*args))[1])


def main(recipe_file: str, cache: str, root: str, overrides: str, *points: str) -> None:
    recipe = load_recipe(recipe_file, json.loads(overrides))
    statuses = []
    for point in points:
        child = os.fork()
        if child == 0:
            arm(point)
            distill(recipe, Path(cache), Path(root), progress=SilentProgress())
            os._exit(0)
        statuses.append(os.waitpid(child, 0)[1])
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(*sys.argv[1:])
