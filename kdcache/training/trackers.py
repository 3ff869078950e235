"""Trackers: TensorBoard, Weights & Biases and MLflow get the lines of metrics.jsonl, under the same names.

    with tracked(MetricsLog(run.metrics, "distill"), recipe.distill, name=recipe.name, progress=progress) as on_metrics:
        loop.train(..., on_metrics=on_metrics)

accelerate's tracker classes do the work; none of the three is imported without the recipe key. metrics.jsonl is the
record of a run, a tracker only a view of it: one that fails is reported once and left out, and the training goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kdcache.errors import RecipeError

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.recipe import OptimSection
    from kdcache.recipe.values import TrackerName
    from kdcache.training.metrics_log import MetricsLog

OnMetrics = Callable[[dict[str, Any]], None]
_COUNTS = ("event", "step", "steps", "stage")  # of a line, which are no measurements


class Tracker(Protocol):
    """What is used of accelerate's ``GeneralTracker``."""

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, Any], step: int | None = None) -> None: ...

    def finish(self) -> None: ...


def check_trackers(section: OptimSection, key: str) -> None:
    """RecipeError if ``section``, of the name ``key``, asks for a tracker whose package is not installed."""
    for name in section.trackers or ():
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # W&B's own directory wandb/ would be found without an origin
            raise RecipeError(
                f"{key}.trackers names '{name}', and the package '{name}' is not installed",
                f"Install the extra: pip install 'kdcache[{name}]'; or leave it out of {key}.trackers.",
            )


@contextlib.contextmanager
def tracked(log: MetricsLog, section: OptimSection, *, name: str, progress: Progress) -> Iterator[OnMetrics]:
    """A callable for ``loop.train(on_metrics=...)`` that also feeds the trackers of ``section``, until the block ends.

    Args:
        log: gets every line first; TensorBoard and W&B keep their files in its directory.
        section: of the recipe, with ``trackers``; its other keys are the configuration that the trackers show.
        name: of the recipe: the group of W&B runs, the experiment of MLflow.
        progress: gets one line for a tracker that fails.
    """
    if not section.trackers:
        yield log
        return
    followers = [_Follower(kind, section, name, log, progress) for kind in section.trackers]

    def both(line: dict[str, Any]) -> None:
        log(line)
        for follower in followers:
            follower.line(line)

    try:
        yield both
    finally:
        for follower in followers:
            follower.finish()


class _Follower:
    """One tracker. It starts with the first step of the training, and is dropped at its first failure."""

    def __init__(
        self, kind: TrackerName, section: OptimSection, name: str, log: MetricsLog, progress: Progress
    ) -> None:
        self._kind, self._section, self._progress = kind, section, progress
        self._name, self._log = name, log
        self._tracker: Tracker | None = None
        self._failed = False

    def line(self, line: Mapping[str, Any]) -> None:
        """A line as ``loop.train`` gives it."""
        if line["event"] == "start":
            self._safely(lambda: self._start(int(line["step"])))
            return
        values = {key: value for key, value in line.items() if key not in _COUNTS and _is_finite(value)}
        if values and line["event"] != "checkpoint":
            self._safely(lambda: self._show(values, int(line["step"])))

    def finish(self) -> None:
        """Close the tracker."""
        if self._tracker is not None:
            self._safely(self._tracker.finish)

    def _start(self, step: int) -> None:
        tracker = make_tracker(self._kind, self._name, self._log.stage, self._log.directory, step)
        tracker.start()
        self._tracker = tracker
        if self._kind != "tensorboard":  # there, each configuration would be a run of its own
            tracker.store_init_configuration(_configuration(self._section))

    def _show(self, values: dict[str, Any], step: int) -> None:
        if self._tracker is not None:
            self._tracker.log(values, step=step)

    def _safely(self, action: Callable[[], None]) -> None:
        """Do ``action``; an error is one line, and the end of the tracker."""
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # of a package with errors of its own kinds: the network, a quota, a full disk
            self._failed, self._tracker = True, None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            self._progress.note(
                f"tracker '{self._kind}' failed and is left out from here: {reason}. The training goes on; all metrics "
                "are in metrics.jsonl"
            )


def make_tracker(kind: TrackerName, name: str, stage: str, root: Path, step: int) -> Tracker:
    """Accelerate's tracker, not started; ``step``: that of the checkpoint from which the training starts."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    made = LOGGER_TYPE_TO_CLASS[kind]
    if kind == "tensorboard":  # what an interrupted training wrote after its checkpoint is replaced
        tracker = made(stage, str(root / "tensorboard"), purge_step=step + 1)
    elif kind == "wandb":
        tracker = made("kdcache", name=f"{name} {stage}", group=name, job_type=stage, dir=str(root))
    else:
        tracker = made(experiment_name=name, run_name=stage)
    known: Tracker = tracker
    return known


def _configuration(section: OptimSection) -> dict[str, Any]:
    """The keys of a section that are set; tables and lists as JSON."""
    values = section.model_dump(mode="json", exclude_none=True, exclude={"trackers"})
    plain = (str, int, float, bool)
    return {key: value if isinstance(value, plain) else json.dumps(value) for key, value in values.items()}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
