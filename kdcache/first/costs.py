"""A rough estimate of what a recipe costs, from rows, tokens, model sizes and processor cores.

A pass of a text takes about two floating-point operations per weight and token, a training step three times as much.
The rate is the one that co-finetuning MPNet and training a 3-layer student reached on two cores (50 and 44 GFLOP/s
per core), rounded down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.cores import usable_cores
from kdcache.progress import counted, format_bytes

if TYPE_CHECKING:
    from kdcache.first.models import ModelFacts

RATE = 40e9  # floating-point operations per second and core
_STORED = 132  # bytes per token and layer: 128 numbers in int8 and a scale


@dataclass(frozen=True)
class Work:
    """What is to be done: numbers of rows with labels, of all texts, tokens per text, epochs of both trainings."""

    train: int
    texts: int
    tokens: float
    cofinetune_epochs: int
    distill_epochs: int


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes, about."""

    cores: int
    cofinetune: float
    dump: float
    students: float  # the student, and the same one without teachers
    cache: int
    teachers: int

    def lines(self) -> list[str]:
        """Text for people."""
        return [
            f"on {counted(self.cores, 'processor core')}, without a GPU: teachers {_about(self.cofinetune)}",
            f"dump {_about(self.dump)}, student with and without teachers {_about(self.students)}",
            f"disk: cache {format_bytes(self.cache)}, teachers {format_bytes(self.teachers)}",
        ]


def estimate(
    work: Work, trained: Sequence[ModelFacts], used: Sequence[ModelFacts], student: ModelFacts, layers: int | None
) -> Costs:
    """The costs of a run. ``trained``: the teachers that are co-finetuned; ``used``: all of them."""
    rate = RATE * usable_cores()
    kept = layers or student.blocks or 12
    blocks = student.blocks or 12
    of_student = student.encoder_parameters * kept / blocks

    def seconds(parameters: float, texts: float, factor: int) -> float:
        return factor * 2 * parameters * work.tokens * texts / rate

    every = sum(facts.encoder_parameters for facts in used)
    taught = seconds(sum(facts.encoder_parameters for facts in trained), work.train * work.cofinetune_epochs, 3)
    studied = seconds(of_student, (work.texts + work.train) * work.distill_epochs, 3)
    cache = len(used) * work.texts * (kept * work.tokens * _STORED + 12 * work.tokens + 16)
    disk = 4 * sum(facts.parameters for facts in used)
    return Costs(usable_cores(), taught, seconds(every, work.texts, 1), studied, round(cache), disk)


def _about(seconds: float) -> str:
    if seconds < 60:
        return "under a minute"
    return f"about {counted(round(seconds / 60), 'minute')}" if seconds < 5400 else f"about {seconds / 3600:.3g} hours"
