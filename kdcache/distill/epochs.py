"""Which rows a process sees in which step: what cached and live targets have in common before any teacher is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.memory import give_back_freed
from kdcache.distill.order import Window, epoch_order, step_count, step_rows
from kdcache.errors import RecipeError

if TYPE_CHECKING:
    from kdcache.distill.examples import JoinedExamples


_MANY = 1 << 18  # examples, from which on ordering them takes arrays of megabytes for a moment


@dataclass(frozen=True, eq=False)
class Epochs:
    """The order of all epochs over joined examples, and one process's share of it."""

    examples: JoinedExamples
    batch_size: int
    seed: int
    window: Window
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.window != "all" and self.window < 1:
            raise RecipeError(
                f"window is {self.window} parts; at least 1 is needed", "Set distill.window to a number of parts, or to 'all'."
            )
        if not self.batch_size >= self.world > self.rank >= 0:
            raise RecipeError(
                f"a batch of {self.batch_size} rows cannot be shared by process {self.rank} of {self.world}",
                "Each process needs at least one row: raise distill.batch_size.",
            )

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return step_count(len(self.examples), self.batch_size, self.world)

    def order(self, epoch: int) -> np.ndarray:
        """All examples in the order of ``epoch``."""
        order = epoch_order(self.examples.parts, seed=self.seed, epoch=epoch, window=self.window)
        if len(order) > _MANY:
            give_back_freed()
        return order

    def rows(self, order: np.ndarray, step: int) -> np.ndarray:
        """The share of process ``rank`` of a step, as positions in ``examples``."""
        return step_rows(order, step, self.batch_size, rank=self.rank, world=self.world)

    def shares(self, order: np.ndarray, first_step: int) -> tuple[np.ndarray, np.ndarray]:
        """All of this process's examples from ``first_step`` on, and the step of each."""
        end = min(len(order), self.steps * self.batch_size)
        place = np.arange(first_step * self.batch_size, end, dtype=order.dtype)
        step = place // self.batch_size
        if self.world == 1:
            return order[first_step * self.batch_size : end], step
        size = np.minimum(len(order) - step * self.batch_size, self.batch_size)
        within = place - step * self.batch_size
        mine = (within >= self.rank * size // self.world) & (within < (self.rank + 1) * size // self.world)
        return order[place[mine]], step[mine]
