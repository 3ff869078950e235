"""Trackers get the lines of metrics.jsonl, change no result, and never stop a training."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdcache.distill.stage import distill
from kdcache.errors import RecipeError
from kdcache.progress import SilentProgress
from kdcache.recipe import DistillSection
from kdcache.runs import RunDirectory, stage_inputs, student_digest
from kdcache.training.metrics_log import MetricsLog
from kdcache.training.trackers import check_trackers, tracked
from tests.conftest import TinyRun

STEPS = {"event": "steps", "step": 1, "epoch": 1, "steps": 1, "learning_rate": 1e-3, "loss": 0.5}
EPOCH = {"event": "epoch", "step": 1, "epoch": 1, "validation/accuracy": 0.75, "score": 0.75}


@dataclass
class Notes(SilentProgress):
    lines: list[str] = field(default_factory=list)

    def note(self, message: str) -> None:
        self.lines.append(message)


@dataclass
class Fake:
    """accelerate's GeneralTracker at the boundary of its package; fails in the methods named."""

    made: tuple[Any, ...]
    options: dict[str, Any]
    fails: tuple[str, ...] = ()
    calls: list[Any] = field(default_factory=list)

    def _call(self, name: str, *values: Any) -> None:
        self.calls.append((name, *values))
        if name in self.fails:
            raise ConnectionError("no route to host.\nTraceback: and more")

    def start(self) -> None:
        self._call("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._call("configuration", values)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._call("log", values, step)

    def finish(self) -> None:
        self._call("finish")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """The trackers that were made, in order; set ``fails`` of the module's list to let them fail."""
    made: list[Fake] = []

    def make(kind: str) -> Any:
        def build(*arguments: Any, **options: Any) -> Fake:
            made.append(Fake((kind, *arguments), options, FAILS.get(kind, ())))
            return made[-1]

        return build

    from accelerate import tracking

    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", {kind: make(kind) for kind in ("wandb", "mlflow")})
    FAILS.clear()
    return made


FAILS: dict[str, tuple[str, ...]] = {}


def play(section: DistillSection, path: Path, progress: Notes) -> None:
    log = MetricsLog(path / "metrics.jsonl", "distill")
    with tracked(log, section, name="sst2", progress=progress) as on_metrics:
        for line in ({"event": "start", "step": 0, "epoch": 1}, STEPS, {**EPOCH, "event": "checkpoint"}, EPOCH):
            on_metrics(dict(line))


def test_names_and_values_are_those_of_the_metrics(fakes: list[Fake], tmp_path: Path) -> None:
    play(DistillSection(trackers=["wandb", "mlflow"], epochs=7), tmp_path, Notes())
    wandb, mlflow = fakes
    assert wandb.made == ("wandb", "kdcache")
    assert wandb.options == {"name": "sst2 distill", "group": "sst2", "job_type": "distill", "dir": str(tmp_path)}
    assert mlflow.options == {"experiment_name": "sst2", "run_name": "distill"}
    for fake in fakes:
        assert [call[0] for call in fake.calls] == ["start", "configuration", "log", "log", "finish"]
        settings = fake.calls[1][1]
        assert settings["epochs"] == 7
        assert json.loads(settings["weights"]) == {"task": 1.0, "soft": 1.0, "hidden": 0.1}
        assert "trackers" not in settings
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line, call in zip(lines, wandb.calls[2:4], strict=True):
        shown = {key: value for key, value in line.items() if key not in ("stage", "event", "step", "steps")}
        assert call == ("log", shown, line["step"])


def test_values_that_are_not_finite_are_left_out(fakes: list[Fake], tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", "distill")
    with tracked(log, DistillSection(trackers=["wandb"]), name="sst2", progress=Notes()) as on_metrics:
        on_metrics({"event": "start", "step": 0, "epoch": 1})
        on_metrics({**STEPS, "grad_norm": float("inf")})
    assert "grad_norm" not in fakes[0].calls[2][1]


@pytest.mark.parametrize("method", ["start", "configuration", "log", "finish"])
def test_a_tracker_that_fails_is_one_line_and_the_other_goes_on(fakes: list[Fake], tmp_path: Path, method: str) -> None:
    FAILS["wandb"] = (method,)
    notes = Notes()
    play(DistillSection(trackers=["wandb", "mlflow"]), tmp_path, notes)
    assert len(notes.lines) == 1
    assert "tracker 'wandb' failed and is left out from here: no route to host. The training goes on" in notes.lines[0]
    assert [call[0] for call in fakes[0].calls].count(method) == 1
    assert [call[0] for call in fakes[1].calls] == ["start", "configuration", "log", "log", "finish"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_training_that_fails_still_closes_its_trackers(fakes: list[Fake], tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", "distill")
    with (
        pytest.raises(KeyboardInterrupt),
        tracked(log, DistillSection(trackers=["mlflow"]), name="sst2", progress=Notes()) as on_metrics,
    ):
        on_metrics({"event": "start", "step": 0, "epoch": 1})
        raise KeyboardInterrupt
    assert [call[0] for call in fakes[0].calls] == ["start", "configuration", "finish"]


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["nothing", "a directory of that name"])
def test_a_missing_package_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found if name == "mlflow" else SimpleNamespace(origin="x")
    )
    check_trackers(DistillSection(trackers=["wandb"]), "distill")
    with pytest.raises(
        RecipeError, match=r"distill.trackers names 'mlflow', and the package 'mlflow' is not"
    ) as raised:
        check_trackers(DistillSection(trackers=["wandb", "mlflow"]), "distill")
    assert "pip install 'kdcache[mlflow]'" in raised.value.hint


def test_a_tracker_that_does_not_exist_is_refused(tiny_run: TinyRun) -> None:
    with pytest.raises(RecipeError, match="'tensorboard', 'wandb' or 'mlflow' was expected"):
        tiny_run.recipe('distill.trackers=["neptune"]')
    with pytest.raises(RecipeError, match="named more often"):
        tiny_run.recipe('distill.trackers=["wandb", "wandb"]')


def test_trackers_are_no_part_of_what_a_student_or_teacher_depends_on(tiny_run: TinyRun) -> None:
    plain = tiny_run.recipe()
    followed = tiny_run.recipe('distill.trackers=["tensorboard"]', 'cofinetune.trackers=["wandb"]')
    for stage in ("teachers", "cache", "student", "baseline"):
        assert stage_inputs(plain, stage) == stage_inputs(followed, stage)
    assert student_digest(plain) == student_digest(followed)


class _Cut(SilentProgress):
    """Interrupts a training after some steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:  # noqa: ARG002
        if values:
            self._left -= 1
        if not self._left:
            raise KeyboardInterrupt


def test_tensorboard_shows_the_metrics_of_a_training_that_was_resumed_with_it(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    """Turned on for a resumed training, and interrupted again: the curves are those of metrics.jsonl."""
    checkpoints, on = "distill.checkpoint_steps=2", 'distill.trackers=["tensorboard"]'
    root = tmp_path / "run"
    for recipe, steps in ((tiny_run.recipe(checkpoints), 3), (tiny_run.recipe(checkpoints, on), 3)):
        with pytest.raises(KeyboardInterrupt):
            distill(recipe, tiny_run.cache, root, progress=_Cut(steps))
    result = distill(tiny_run.recipe(checkpoints, on), tiny_run.cache, root, progress=SilentProgress())
    undisturbed = distill(tiny_run.recipe(checkpoints), tiny_run.cache, tmp_path / "other", progress=SilentProgress())
    assert result.scores == undisturbed.scores
    shown = curves(root / "tensorboard" / "distill")
    lines = [json.loads(line) for line in RunDirectory(root).metrics.read_text().splitlines()]
    assert {line["step"] for line in lines if line["event"] == "steps"} == set(range(1, 9))
    for name in ("loss", "learning_rate", "validation/accuracy"):
        expected = {line["step"]: line[name] for line in lines if name in line and line["step"] > 2}
        assert shown[name] == pytest.approx(expected, rel=1e-6)
    assert shown["loss"].keys() == set(range(3, 9))


def curves(directory: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> value, as TensorBoard itself reads the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(directory))
    read.Reload()
    return {name: {event.step: event.value for event in read.Scalars(name)} for name in read.Tags()["scalars"]}


def test_without_the_key_the_log_itself_is_used(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", "distill")
    with tracked(log, DistillSection(), name="sst2", progress=Notes()) as on_metrics:
        assert on_metrics is log
