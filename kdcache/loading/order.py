"""The order of an epoch: a pure function of (seed, epoch, window) and of which part each example's text lies in.

Parts are put in a seeded order. An example of the p-th part gets the key p + W * u with u uniform in [0, 1), and
examples are sorted by key. At key x only parts p with x - W < p <= x have examples, so a window of W parts slides over
the cache: the first batches need one part only, each part is read once, and it can be freed after its last example.
With the window 'all' the key is u alone: a uniform permutation, whose first batches need nearly all parts.

Transfer texts that are stored with logits only lie in parts of their own. Their examples are ordered by themselves,
with a window of their own, and merged with the others in proportion, so that every batch has its share of both.

The steps of an epoch are consecutive slices of this order, and a process takes its slice of every step. Three integers
(seed, epoch, step) are therefore enough to resume in the middle of an epoch, also with another number of processes.

Only raw outputs of the bit generator are used: numpy guarantees those streams for ever, but not those of its
distributions (NEP 19).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from kdcache.cache.memory import give_back_freed
from kdcache.errors import RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray


Window = int | Literal["all"]  # in parts
_ROWS_AT_ONCE = 1 << 20


def blocks(count: int) -> Iterator[slice]:
    """Slices that cover ``count`` rows: temporary arrays of a block are small."""
    return (slice(start, start + _ROWS_AT_ONCE) for start in range(0, count, _ROWS_AT_ONCE))


def distinct_parts(parts: np.ndarray) -> list[int]:
    """The numbers that are in ``parts`` [n], in order."""
    there = np.zeros(0, np.bool_)
    for some in blocks(len(parts)):
        there = np.pad(there, (0, max(0, int(parts[some].max()) + 1 - len(there))))
        there[parts[some]] = True
    return list(np.flatnonzero(there).tolist())


def epoch_order(
    parts: NDArray[np.integer],
    *,
    seed: int,
    epoch: int,
    window: Window,
    logits_only: NDArray[np.bool_] | None = None,
) -> NDArray[np.integer]:
    """Positions of all examples in the order of ``epoch``, int32 if that is wide enough.

    ``parts`` [n] is the part of each example's text; ``logits_only`` [n] marks those that are ordered by themselves.
    """
    dtype = np.int32 if len(parts) < 2**31 else np.int64
    if logits_only is None:
        return _window_order(parts, seed, epoch, window, 0).astype(dtype, copy=False)
    groups = [np.flatnonzero(~logits_only), np.flatnonzero(logits_only)]
    orders = [
        group[_window_order(parts[group], seed, epoch, window, purpose)]
        for group, purpose in zip(groups, (0, 4), strict=True)
    ]
    share = np.concatenate([(np.arange(len(order)) + 0.5) / max(len(order), 1) for order in orders])
    return np.concatenate(orders)[np.argsort(share, kind="stable")].astype(dtype)


def _window_order(
    parts: NDArray[np.integer], seed: int, epoch: int, window: Window, purpose: int
) -> NDArray[np.integer]:
    """Positions in an order whose random numbers are those of ``purpose`` and ``purpose + 1``."""
    key = _uniform(seed, epoch, len(parts), purpose)
    if window != "all":
        numbers = np.array(distinct_parts(parts), np.int64)
        place = np.zeros(int(numbers[-1]) + 1 if len(numbers) else 0)  # of a part in the order of parts
        place[numbers[np.argsort(_uniform(seed, epoch, len(numbers), purpose + 1), kind="stable")]] = np.arange(
            len(numbers)
        )
        key *= window
        for some in blocks(len(parts)):
            key[some] += place[parts[some]]
    return _stable_order(key) if len(key) <= _MANY else _order_in_pieces(key)


def _order_in_pieces(key: NDArray[np.float64]) -> NDArray[np.integer]:
    """``_stable_order`` of many keys with 12 bytes of a key in memory: keys are divided by size, and each piece sorted.

    A key lies at or after its place among evenly spread ones, so dividing never exchanges two keys.
    """
    least, most = float(key.min()), float(key.max())
    pieces = min(-(-len(key) // _MANY), 1 << 15)
    scale = pieces / (most - least) if most > least else 0.0

    def divided() -> Iterator[tuple[int, NDArray[np.integer], NDArray[np.integer]]]:
        for some in blocks(len(key)):
            piece = np.minimum((key[some] - least) * scale, pieces - 1).astype(np.uint16)
            yield some.start, piece, np.bincount(piece, minlength=pieces)

    starts = np.concatenate([[0], np.cumsum(sum(counts for _, _, counts in divided()))])
    order: NDArray[np.integer] = np.empty(len(key), np.int32 if len(key) < 2**31 else np.int64)
    next_ = starts[:-1].copy()
    for first, piece, counts in divided():
        rows = np.argsort(piece, kind="stable")  # by digits
        offset = np.repeat(next_ - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        order[offset + np.arange(len(rows))] = rows + first
        next_ += counts
    for start, end in itertools.pairwise(starts.tolist()):
        own = order[start:end]
        order[start:end] = own[_stable_order(key[own])]
    return order


def _stable_order(key: NDArray[np.float64]) -> NDArray[np.integer]:
    """``np.argsort(key, kind="stable")`` in a third of its time: equal keys are rare, and are put in order after."""
    order = np.argsort(key)
    ordered = key[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(same):
        places = np.union1d(same, same + 1)
        rows = order[places]
        order[places] = rows[np.lexsort((rows, key[rows]))]
    return order


def step_count(examples: int, batch_size: int, world: int = 1) -> int:
    """Steps of an epoch. The last may hold fewer rows than ``batch_size``; with fewer than ``world`` it is left out."""
    full, rest = divmod(examples, batch_size)
    return full + (rest >= world)


def step_rows(
    order: NDArray[np.integer], step: int, batch_size: int, *, rank: int = 0, world: int = 1
) -> NDArray[np.integer]:
    """The share of process ``rank`` of ``world`` in a step: near-equal, consecutive slices in the epoch's order."""
    rows = order[step * batch_size : (step + 1) * batch_size]
    return rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]


def _uniform(seed: int, epoch: int, count: int, purpose: int) -> NDArray[np.float64]:
    generator, uniform = np.random.PCG64(np.random.SeedSequence([seed, epoch, purpose])), np.empty(count)
    for some in blocks(count):
        raw = np.asarray(generator.random_raw(len(uniform[some])), np.uint64)
        raw >>= np.uint64(11)
        uniform[some] = raw
    uniform *= 2.0**-53
    return uniform


_MANY = 1 << 18  # examples; more are ordered in pieces of this size


@dataclass(frozen=True)
class BatchSettings:
    """How rows become batches, whatever their targets. Raises RecipeError for values that no epoch can have.

    Attributes:
        batch_size: rows of a step over all processes.
        max_length: tokens that the student reads of a text.
        seed: of the order.
        window: from how many parts rows are drawn; ``"all"`` is a uniform shuffle, for which all parts are read first.
        missing: ``"skip"`` leaves out examples whose text the cache lacks.
        rank: this process, which takes its share of every step.
        world: how many processes there are.
        every_row: a last step with fewer rows than processes is kept; those without a row get no batch for it.
    """

    batch_size: int
    max_length: int
    seed: int = 0
    window: Window = 8
    missing: Literal["error", "skip"] = "error"
    rank: int = 0
    world: int = 1
    every_row: bool = False

    def __post_init__(self) -> None:
        if self.window != "all" and self.window < 1:
            raise RecipeError(
                f"window is {self.window} parts; at least 1 is needed",
                "Set distill.window to a number of parts, or to 'all'.",
            )
        if not self.batch_size >= self.world > self.rank >= 0:
            raise RecipeError(
                f"a batch of {self.batch_size} rows cannot be shared by process {self.rank} of {self.world}",
                "Each process needs at least one row: raise distill.batch_size.",
            )


@dataclass(frozen=True, eq=False)
class Epochs:
    """The order of all epochs over examples whose texts lie in ``parts`` [n], and one process's share of it.

    ``logits_only`` [n]: which examples are transfer texts without hidden states; None if there are none.
    """

    parts: NDArray[np.integer]
    settings: BatchSettings
    logits_only: NDArray[np.bool_] | None = None

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        world = 1 if self.settings.every_row else self.settings.world
        return step_count(len(self.parts), self.settings.batch_size, world)

    def order(self, epoch: int) -> np.ndarray:
        """All examples in the order of ``epoch``."""
        seed, window = self.settings.seed, self.settings.window
        order = epoch_order(self.parts, seed=seed, epoch=epoch, window=window, logits_only=self.logits_only)
        if len(order) > _MANY:
            give_back_freed()
        return order

    def rows(self, order: np.ndarray, step: int) -> np.ndarray:
        """The share of this process in a step, as positions in the examples."""
        settings = self.settings
        return step_rows(order, step, settings.batch_size, rank=settings.rank, world=settings.world)

    def parts_of(self, rows: np.ndarray) -> np.ndarray:
        """The part of each of these examples [m]."""
        parts = np.empty(len(rows), self.parts.dtype)
        for some in blocks(len(rows)):  # numpy copies an index to 8 bytes a row
            parts[some] = self.parts[rows[some]]
        return parts

    def steps_here(self, order: np.ndarray, first_step: int) -> range:
        """The steps from ``first_step`` on in which this process has rows: all but perhaps the last."""
        empty = self.steps > first_step and not len(self.rows(order, self.steps - 1))
        return range(first_step, self.steps - empty)

    def shares(self, order: np.ndarray, first_step: int) -> tuple[np.ndarray, np.ndarray]:
        """All of this process's examples from ``first_step`` on, and the step of each."""
        rank, world, batch_size = self.settings.rank, self.settings.world, self.settings.batch_size
        end = min(len(order), self.steps * batch_size)
        place = np.arange(first_step * batch_size, end, dtype=order.dtype)
        if world == 1:
            place //= batch_size
            return order[first_step * batch_size : end], place
        step = place // batch_size
        size = np.minimum(len(order) - step * batch_size, batch_size)
        within = place - step * batch_size
        mine = (within >= rank * size // world) & (within < (rank + 1) * size // world)
        return order[place[mine]], step[mine]
