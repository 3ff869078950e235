"""Runs a training again and again in forked children that kill themselves, and prints what became of it.

    python tests/distill/killed.py RECIPE CACHE OVERRIDES ATTEMPTS

ATTEMPTS is JSON: run directory -> list of points. One process imports everything once; each child gets one point: ``step:N``
(SIGKILL in optimizer step N), ``save:N`` and ``saved:N`` (before and after the N-th checkpoint write), ``disk:N`` (before the
N-th system step of writing), ``end`` (none). Prints JSON: run directory -> exit statuses.
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


def import_all() -> None:
    """What children would each import for themselves."""
    import accelerate
    import zarr
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING, BertConfig, RobertaConfig, XLMRobertaConfig

    assert accelerate
    assert zarr
    assert MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[BertConfig]
    assert [MODEL_MAPPING[kind] for kind in (BertConfig, RobertaConfig, XLMRobertaConfig)]


def main(recipe_file: str, cache: str, overrides: str, attempts: str) -> None:
    import_all()
    recipe = load_recipe(recipe_file, json.loads(overrides))
    statuses: dict[str, list[int]] = {}
    for root, points in json.loads(attempts).items():
        for point in points:
            child = os.fork()
            if child == 0:
                arm(point)
                distill(recipe, Path(cache), Path(root), progress=SilentProgress())
                os._exit(0)
            statuses.setdefault(root, []).append(os.waitpid(child, 0)[1])
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(*sys.argv[1:])
