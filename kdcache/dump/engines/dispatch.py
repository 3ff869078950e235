"""Which worker gets which piece of a dump, and what happens when workers fail, die, join or leave.

Workers pull: one gets its next piece when it has finished one. A worker stays with its teacher while there is work for
it. Before the first part with hidden states of a teacher, one worker fits its bases. When nothing is left to be given
out, a piece that takes much longer than the others is given to a second worker; the first result counts.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kdcache.dump.engines.messages import About, Failed, Fitted, Outcome, Written
from kdcache.errors import KdcacheError

DEPTH = 2  # pieces that a worker has at a time: the second one runs while the first one is written
_ATTEMPTS = 3  # failures of a piece, or of a worker in a row, before it is given up
_SLOW = 2.0  # times the mean duration after which a piece is given to a second worker
_FIRST = 60.0  # seconds instead, while no piece has ended


class Key(NamedTuple):
    """A piece, or, with an empty ``part``, the bases of a teacher."""

    teacher: str
    part: str


class Event(NamedTuple):
    """News of a worker. ``key`` is None for its check; ``outcome`` is None if the worker died."""

    worker: str
    key: Key | None
    outcome: Outcome | None


class Pool(Protocol):
    """Workers somewhere. One thread calls it."""

    def submit(self, worker: str, key: Key) -> None:
        """Give a piece to a worker."""
        ...

    def wait(self, seconds: float) -> Sequence[Event]:
        """What happened since the last call; waits for the first event so long. New workers are asked to check
        themselves here.
        """
        ...

    def drop(self, worker: str) -> None:
        """End a worker; no event of it comes any more, and no other worker takes its place."""
        ...

    def may_grow(self) -> bool:
        """Whether a worker may still join without anybody's action."""
        ...


class Work:
    """The pieces that are left, and who runs which."""

    def __init__(
        self,
        parts: Mapping[str, Sequence[tuple[str, bool]]],
        unfitted: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``parts``: teacher -> name of each missing part, and whether it needs the teacher's bases."""
        self._free = {name: deque(part for part, bound in own if not bound) for name, own in parts.items()}
        self._bound = {name: deque(part for part, bound in own if bound) for name, own in parts.items()}
        self._unfitted = set(unfitted)
        self._running: dict[Key, dict[str, float]] = {}  # piece -> worker -> time of its start
        self._teacher_of: dict[str, str] = {}
        self._workers_on: Counter[str] = Counter()
        self._clock = clock
        self._seconds, self._ended = 0.0, 0
        self.left = sum(map(len, parts.values()))  # pieces without a result

    @property
    def waiting(self) -> int:
        """Pieces that nobody runs."""
        return sum(len(own) for queues in (self._free, self._bound) for own in queues.values())

    def next_for(self, worker: str, busy: int, workers: int) -> Key | None:
        """What a worker that has ``busy`` pieces runs next; None: nothing for now."""
        if busy and self.waiting <= workers:
            return None  # the last pieces go to idle workers
        teacher = self._choose(worker)
        if teacher is None:
            key = None if busy else self._slow_one(worker)
        elif self._free[teacher]:
            key = Key(teacher, self._free[teacher].popleft())
        elif teacher in self._unfitted:
            key = Key(teacher, "")
        else:
            key = Key(teacher, self._bound[teacher].popleft())
        if key is not None:
            self._running.setdefault(key, {})[worker] = self._clock()
            self._stay(worker, key.teacher)
        return key

    def _choose(self, worker: str) -> str | None:
        """The worker's teacher if there is work for it, else the one with most work per worker."""
        own = self._teacher_of.get(worker)
        open_ones = [name for name in self._free if self._offers(name)]
        if own in open_ones:
            return own
        return max(open_ones, key=self._share, default=None)

    def _offers(self, name: str) -> bool:
        fitting = Key(name, "") in self._running
        return bool(self._free[name]) or (bool(self._bound[name]) and not fitting)

    def _share(self, name: str) -> float:
        return (len(self._free[name]) + len(self._bound[name])) / (1 + self._workers_on[name])

    def _stay(self, worker: str, teacher: str) -> None:
        before = self._teacher_of.get(worker)
        if before != teacher:
            if before is not None:
                self._workers_on[before] -= 1
            self._workers_on[teacher] += 1
            self._teacher_of[worker] = teacher

    def _slow_one(self, worker: str) -> Key | None:
        """The piece that one other worker has had for longest, if it is late."""
        late = _SLOW * self._seconds / self._ended + 1.0 if self._ended else _FIRST
        now, candidates = self._clock(), []
        for key, runners in self._running.items():
            began = min(runners.values())
            if len(runners) == 1 and worker not in runners and now - began > late:
                candidates.append((began, key))
        return min(candidates)[1] if candidates else None

    def done(self, key: Key, seconds: float) -> bool:
        """Take note of a result; returns whether it is the first one of this piece."""
        if self._running.pop(key, None) is None:
            return False
        if key.part:
            self.left -= 1
            self._seconds, self._ended = self._seconds + seconds, self._ended + 1
        else:
            self._unfitted.discard(key.teacher)
        return True

    def back(self, key: Key, worker: str) -> None:
        """A worker will not give a result for a piece; if nobody else runs it, it is given out again."""
        runners = self._running.get(key)
        if runners is None or runners.pop(worker, None) is None or runners:
            return
        del self._running[key]
        if key.part:  # pieces that need bases are given out only when these are there: either queue is right then
            fitted = key.teacher not in self._unfitted
            (self._bound if fitted else self._free)[key.teacher].appendleft(key.part)

    def gone(self, worker: str) -> list[Key]:
        """A worker left; returns what it had."""
        had = [key for key, runners in self._running.items() if worker in runners]
        for key in had:
            self.back(key, worker)
        teacher = self._teacher_of.pop(worker, None)
        if teacher is not None:
            self._workers_on[teacher] -= 1
        return had


@dataclass
class WorkerState:
    """What the driver knows of a worker. ``seconds`` are those of its pieces."""

    busy: int = 0
    parts: int = 0
    texts: int = 0
    seconds: float = 0.0
    failures: int = 0
    in_a_row: int = 0


@dataclass
class Crew:
    """The workers of a dump, by name; ``past`` are those that left."""

    now: dict[str, WorkerState] = field(default_factory=dict)
    past: dict[str, WorkerState] = field(default_factory=dict)
    failures: int = 0

    def leaves(self, worker: str) -> None:
        state = self.now.pop(worker, None)
        if state is not None:
            self.past[worker] = state


class Drive:
    """Runs ``work`` on the workers of ``pool``; ``take`` gets each first result, ``tell`` lines for people."""

    def __init__(
        self, pool: Pool, work: Work, take: Callable[[Written | Fitted, Crew], None], tell: Callable[[str], None]
    ) -> None:
        self._pool, self._work, self._take, self._tell = pool, work, take, tell
        self._failures: Counter[Key] = Counter()
        self._reason: KdcacheError | None = None
        self.crew = Crew()

    def run(self) -> None:
        """Return when every piece has a result.

        Raises the error of a piece that fails on several workers, or of the last worker if none is left.
        """
        while self._work.left:
            self._give_out()
            events = self._pool.wait(1.0)
            for event in sorted(events, key=lambda event: isinstance(event.outcome, Failed)):
                self._hear(event)  # results first: a failure may end the dump
            if not self.crew.now and not self._pool.may_grow():
                raise self._reason or KdcacheError("no worker is left", "Run the same command again: it continues.")

    def _give_out(self) -> None:
        for worker, state in self.crew.now.items():
            while state.busy < DEPTH:
                key = self._work.next_for(worker, state.busy, len(self.crew.now))
                if key is None:
                    break
                state.busy += 1
                self._pool.submit(worker, key)

    def _hear(self, event: Event) -> None:
        worker, key, outcome = event
        if isinstance(outcome, About):
            self.crew.now[worker] = WorkerState()
            self._tell(f"worker {worker} joined")
        elif outcome is None:
            self._lost(worker)
        elif isinstance(outcome, Failed):
            self._failed(worker, key, outcome)
        elif worker in self.crew.now and key is not None:
            state = self.crew.now[worker]
            state.busy, state.in_a_row = state.busy - 1, 0
            if isinstance(outcome, Written):
                state.parts, state.texts = state.parts + 1, state.texts + outcome.texts
                state.seconds += outcome.seconds
            if self._work.done(key, outcome.seconds):
                self._take(outcome, self.crew)

    def _lost(self, worker: str) -> None:
        self.crew.failures += 1
        error = KdcacheError(
            f"worker {worker} died (killed, out of memory, or its machine is gone)",
            "Run the same command again: it continues.",
        )
        self._tell(f"worker {worker} died: others run what it had")
        for key in self._leave(worker):
            self._count_failure(key, error)

    def _failed(self, worker: str, key: Key | None, failed: Failed) -> None:
        error = failed.error(worker)
        self.crew.failures += 1
        if not failed.of_worker:
            raise error
        state = self.crew.now.get(worker)
        if state is not None and key is not None:
            state.busy, state.failures, state.in_a_row = state.busy - 1, state.failures + 1, state.in_a_row + 1
            self._work.back(key, worker)
        if state is None or failed.for_good or state.in_a_row >= _ATTEMPTS:
            self._tell(f"{error.message}; this worker gets no more work")
            self._leave(worker)
            self._pool.drop(worker)
        else:
            self._tell(f"{error.message}; the piece is given out again")
        self._reason = error
        if key is not None and not failed.for_good:
            self._count_failure(key, error)

    def _leave(self, worker: str) -> Iterator[Key] | list[Key]:
        had = self._work.gone(worker)
        self.crew.leaves(worker)
        return had

    def _count_failure(self, key: Key, error: KdcacheError) -> None:
        self._reason = error
        self._failures[key] += 1
        if self._failures[key] >= _ATTEMPTS:
            what = f"{key.part} of teacher '{key.teacher}'" if key.part else f"the bases of teacher '{key.teacher}'"
            raise type(error)(f"{what} failed {_ATTEMPTS} times; the last time: {error.message}", error.hint)
