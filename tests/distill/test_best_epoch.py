"""The best epoch is there at the end, whenever the run was killed, also where an epoch that is run again scores
differently.

On a GPU it may: sums are made in another order. Here the scores are made up, so that a second attempt sees others than
the first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from kdcache import files
from kdcache.distill.stage import DistillTask
from kdcache.files import Disk
from kdcache.progress import SilentProgress
from kdcache.testing.faults import Died, FaultyDisk, UnsyncedDisk
from kdcache.training.best_epoch import BestEpoch
from kdcache.training.loop import train
from kdcache.training.settings import LoopSettings

EPOCHS = 4
SETTINGS = LoopSettings(epochs=EPOCHS, learning_rate=0.1, checkpoint_steps=2, seed=1, identity={"data": "a"})
Scores = Callable[[int], float]


class Distillation(nn.Module):
    """A student and a projection, as far as the task looks at them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Linear(3, 2)
        self.projections = nn.Linear(2, 2)


class Scored(DistillTask):
    """Keeps and loads the best epoch as every distillation does; batches, losses and scores are made up."""

    def __init__(self, place: Path, scores: Scores, history: History) -> None:
        source = SimpleNamespace(steps_per_epoch=3)
        best = BestEpoch(place / "best", place, {"data": "a"})
        super().__init__(cast("Any", Distillation()), cast("Any", source), None, best, epochs=EPOCHS)
        self._scores, self._history = scores, history

    def batches(self, epoch: int, first_step: int) -> Iterator[Any]:
        for step in range(first_step, 3):
            yield torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * epoch + step))

    def losses(self, batch: Any) -> Iterator[tuple[Tensor, dict[str, float | Tensor]]]:
        distillation = cast("Distillation", self.model)
        yield distillation.projections(distillation.student(batch)).square().mean(), {}

    def evaluate(self, epoch: int) -> dict[str, float]:
        self._history.scores[epoch] = self._scores(epoch)
        self._history.weights[epoch] = self.weights()
        return {"score": self._history.scores[epoch]}

    def weights(self) -> bytes:
        student = cast("Distillation", self.model).student
        return b"".join(parameter.detach().numpy().tobytes() for parameter in student.parameters())


class History:
    """What the last evaluation of each epoch saw."""

    def __init__(self) -> None:
        self.scores: dict[int, float] = {}
        self.weights: dict[int, bytes] = {}


def attempt(place: Path, scores: Scores, history: History, disk: Disk, *, in_thread: bool = False) -> None:
    """The training, on a disk that may die; at its end the student has the weights of the best epoch."""
    settings = replace(SETTINGS, write_in_thread=in_thread)
    task = Scored(place, scores, history)
    with files.use_disk(disk):
        outcome = train(task, settings, checkpoints=place, progress=SilentProgress(), on_metrics=lambda _: None)
        task.load_best(outcome.best_epoch)
    assert sorted(history.scores) == list(range(EPOCHS))
    assert outcome.best_epoch == max(range(EPOCHS), key=lambda epoch: history.scores[epoch])
    assert task.weights() == history.weights[outcome.best_epoch]


def dying(at: int) -> FaultyDisk:
    def die() -> None:
        raise Died

    return FaultyDisk(at, die, real=UnsyncedDisk())  # type: ignore[arg-type]  # it does not return


def test_killed_at_every_durable_write_and_scored_differently_afterwards(tmp_path: Path) -> None:
    counting = FaultyDisk(real=UnsyncedDisk())
    attempt(tmp_path / "whole", float, History(), counting)
    assert len(counting.steps) > 60
    for at in range(1, len(counting.steps) + 1):
        history = History()
        with pytest.raises(Died):
            attempt(tmp_path / str(at), float, history, dying(at))  # every epoch better than the one before
        attempt(tmp_path / str(at), lambda epoch: -epoch, history, UnsyncedDisk())  # then every one worse


def test_killed_again_and_again(tmp_path: Path) -> None:
    rng = random.Random(0)
    for run in range(60):
        history = History()
        for _ in range(4):
            try:
                attempt(tmp_path / str(run), lambda _: rng.random(), history, dying(rng.randint(1, 90)))
            except Died:
                continue
            break
        attempt(tmp_path / str(run), lambda _: rng.random(), history, UnsyncedDisk())


def test_killed_at_durable_writes_while_checkpoints_are_written_in_a_thread(tmp_path: Path) -> None:
    """Loop and thread write in an order that differs from run to run; the death of one is the death of both."""
    counting = FaultyDisk(real=UnsyncedDisk())
    attempt(tmp_path / "whole", float, History(), counting, in_thread=True)
    for at in range(1, len(counting.steps) + 1, 5):
        history, place = History(), tmp_path / str(at)
        with pytest.raises(Died):
            attempt(place, float, history, dying(at), in_thread=True)
        attempt(place, lambda epoch: -epoch, history, UnsyncedDisk(), in_thread=True)
