"""Trainings that are killed at a chosen moment: forked children that kill themselves, or are killed by their parent.

A process imports everything once and forks a child for each attempt, which takes a fraction of a second. A point is
``step:N`` (SIGKILL in the child's optimizer step N), ``save:N`` and ``saved:N`` (before and after its N-th checkpoint
or best-epoch write), ``disk:N`` (before its N-th system step of writing), ``after:S`` (by the parent, after S seconds),
``end`` (never).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

from kdcache import files
from kdcache.training import checkpoints


def run_child(action: Callable[[], object], task: type[Any], point: str) -> int:
    """The exit status of a child that runs ``action`` and dies at ``point``; 0 if it finished.

    ``task`` is the class whose ``losses`` is called once per optimizer step.
    """
    kind, _, number = point.partition(":")
    child = os.fork()
    if child == 0:
        _arm(kind, number, task)
        action()
        os._exit(0)
    if kind == "after":
        time.sleep(float(number))
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _arm(kind: str, number: str, task: type[Any]) -> None:
    if kind == "step":
        task.losses = _dying(task.losses, int(number))
    elif kind in ("save", "saved"):
        checkpoints.save = _dying(checkpoints.save, int(number), after=kind == "saved")
    elif kind == "disk":
        step = _dying(lambda: None, int(number))
        for name in ("write", "fsync", "rename", "fsync_directory"):
            original = getattr(files.disk, name)
            setattr(files.disk, name, lambda *args, original=original: (step(), original(*args))[1])


def _dying(function: Callable[..., Any], at: int, *, after: bool = False) -> Callable[..., Any]:
    """``function``, but the process dies at its ``at``-th call."""
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            _die()
        result = function(*args, **kwargs)
        if calls == at:
            _die()
        return result

    return called


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")
