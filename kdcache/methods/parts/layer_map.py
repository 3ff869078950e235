"""The slot G: which teacher layer a student layer learns from. Dumps use the even map too. Imports no torch.

A layer map gives, per teacher, one teacher layer for each student layer 1..K, or None for a student layer without
partner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

LayerMap = dict[str, tuple[int | None, ...]]  # teacher -> a layer of it for each student layer
LayersOfEpoch = Callable[[int], LayerMap]  # epoch from 0 -> the map of that epoch


def even_layers(depth: int, student_layers: int) -> tuple[int, ...]:
    """The teacher layer g(j) = round(j·depth/K) for each student layer j = 1..K (MT-BERT, section 3.2).

    The last student layer is always paired with the last teacher layer. A student that is deeper than the teacher is
    paired with some layers twice.
    """
    return tuple(round(j * depth / student_layers) for j in range(1, student_layers + 1))


@dataclass(frozen=True)
class TeacherLayers:
    """A teacher's number of layers, and the numbers of those that the cache holds (0 = embeddings)."""

    depth: int
    stored: tuple[int, ...]


Draw = Callable[[int], np.ndarray]  # n -> n numbers in [0, 1), by seed, epoch and teacher


class LayerRule(Protocol):
    """The layers of one teacher for student layers 1..K; ``draw`` is there for rules that are random."""

    def __call__(self, teacher: TeacherLayers, student_layers: int, draw: Draw, /) -> tuple[int | None, ...]: ...


@dataclass(frozen=True)
class LayerMapping:
    """A rule with its name; ``per_epoch``: it draws another map in every epoch."""

    name: str
    rule: LayerRule
    per_epoch: bool = False

    def layers(
        self, teachers: Mapping[str, TeacherLayers], student_layers: int, *, seed: int = 0, epoch: int = 0
    ) -> LayerMap:
        """The map of an epoch for all teachers, a pure function of the arguments."""
        epoch = epoch if self.per_epoch else 0
        return {
            name: self.rule(teacher, student_layers, _Draw(seed, epoch, index))
            for index, (name, teacher) in enumerate(teachers.items())
        }


def layers_read(layers: Sequence[int | None]) -> tuple[int, ...]:
    """The teacher layers that a map uses, ascending, each once."""
    return tuple(sorted({layer for layer in layers if layer is not None}))


@dataclass(frozen=True)
class _Draw:
    seed: int
    epoch: int
    teacher: int

    def __call__(self, count: int) -> np.ndarray:
        sequence = np.random.SeedSequence([self.seed, self.epoch, self.teacher, 3])
        return (np.asarray(np.random.PCG64(sequence).random_raw(count), np.uint64) >> np.uint64(11)) * 2.0**-53


def _even(teacher: TeacherLayers, student_layers: int, _draw: Draw, /) -> tuple[int | None, ...]:
    return even_layers(teacher.depth, student_layers)


def _last(teacher: TeacherLayers, student_layers: int, _draw: Draw, /) -> tuple[int | None, ...]:
    return (*(None,) * (student_layers - 1), teacher.depth)


def _random(teacher: TeacherLayers, student_layers: int, draw: Draw, /) -> tuple[int | None, ...]:
    stored = np.asarray(teacher.stored)
    if len(stored) >= student_layers:
        chosen = stored[np.argsort(draw(len(stored)), kind="stable")[:student_layers]]
    else:  # every stored layer, some of them more than once
        chosen = np.resize(stored, student_layers)
    return tuple(int(layer) for layer in np.sort(chosen))


EVEN = LayerMapping("even", _even)  # every (depth/K)-th layer
LAST = LayerMapping("last", _last)  # the last pair alone
RANDOM = LayerMapping("random", _random, per_epoch=True)  # of those stored, ascending (arXiv 2109.10164)
LAYER_MAPPINGS = {mapping.name: mapping for mapping in (EVEN, LAST, RANDOM)}
