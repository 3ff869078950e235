"""Which worker gets which piece: a made-up pool with workers that die, join, fail and hang, on a clock of its own."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from kdcache.dump.engines.dispatch import Crew, Drive, Event, Key, Work
from kdcache.dump.engines.messages import About, Failed, Fitted, Outcome, Written
from kdcache.errors import KdcacheError, MismatchError, NonFiniteError, StorageError


class MadeUpPool:
    """``joins``: worker -> second; ``dies``: worker -> second; ``fails`` may give an outcome instead of the result.

    A worker runs one piece after the other, a second each (``speed`` pieces per second).
    """

    def __init__(self, joins: dict[str, float], dies: dict[str, float] | None = None, **speed: float) -> None:
        self.now = 0.0
        self.joins, self.dies, self.speed = dict(joins), dict(dies or {}), speed
        self.queue: dict[str, list[tuple[float, Key]]] = {}
        self.fails: dict[str, Failed] = {}  # by worker, or by part
        self.refuses: dict[str, Failed] = {}
        self.ran: Counter[Key] = Counter()
        self.given: list[tuple[str, Key]] = []

    def submit(self, worker: str, key: Key) -> None:
        ends = self.queue[worker][-1][0] if self.queue[worker] else self.now
        self.queue[worker].append((ends + 1 / self.speed.get(worker, 1.0), key))
        self.given.append((worker, key))

    def wait(self, seconds: float) -> Sequence[Event]:
        self.now += min(seconds, 0.25)
        events = []
        for worker in [name for name, at in self.joins.items() if at <= self.now]:
            del self.joins[worker]
            refused = self.refuses.get(worker)
            if refused is None:
                self.queue[worker] = []
            events.append(Event(worker, None, refused or About(worker)))
        for worker in [name for name, at in self.dies.items() if at <= self.now and name in self.queue]:
            del self.dies[worker]
            del self.queue[worker]
            events.append(Event(worker, None, None))
        for worker, pieces in self.queue.items():
            while pieces and pieces[0][0] <= self.now:
                _, key = pieces.pop(0)
                events.append(Event(worker, key, self._outcome(worker, key)))
        return events

    def _outcome(self, worker: str, key: Key) -> Outcome:
        failed = self.fails.get(worker) or self.fails.get(key.part)
        if failed is not None:
            return failed
        self.ran[key] += 1
        if not key.part:
            return Fitted(key.teacher, {}, 1.0)
        return Written(key.teacher, key.part, None, {}, 10, 0, 0, 100, 1.0)

    def drop(self, worker: str) -> None:
        self.queue.pop(worker, None)

    def may_grow(self) -> bool:
        return bool(self.joins)


def _parts(teachers: int, full: int, logits: int = 0) -> dict[str, list[tuple[str, bool]]]:
    names = [(f"part-{number:05d}", number < full) for number in range(full + logits)]
    return {f"t{number}": list(names) for number in range(teachers)}


class Run:
    """What a drive took and told."""

    def __init__(
        self, pool: MadeUpPool, parts: dict[str, list[tuple[str, bool]]], unfitted: Sequence[str] = ()
    ) -> None:
        self.pool, self.taken, self.told = pool, list[Key](), list[str]()
        self.drive = Drive(pool, Work(parts, unfitted, clock=lambda: pool.now), self._take, self.told.append)

    def _take(self, outcome: Written | Fitted, _: Crew) -> None:
        self.taken.append(Key(outcome.teacher, outcome.part if isinstance(outcome, Written) else ""))


def test_every_piece_is_taken_once_and_bases_come_before_their_parts() -> None:
    pool = MadeUpPool({"a": 0, "b": 0, "c": 0})
    run = Run(pool, _parts(3, 10, 4), ["t0", "t1", "t2"])
    run.drive.run()
    assert len(run.taken) == len(set(run.taken)) == 3 * 14 + 3
    for teacher in ("t0", "t1", "t2"):
        own = [key for key in run.taken if key.teacher == teacher]
        bound = [place for place, key in enumerate(own) if key.part and key.part < "part-00010"]
        assert own.index(Key(teacher, "")) < min(bound)
    assert {name: state.parts for name, state in run.drive.crew.now.items()}.keys() == {"a", "b", "c"}


def test_a_worker_stays_with_its_teacher() -> None:
    pool = MadeUpPool({"a": 0, "b": 0})
    Run(pool, _parts(2, 30)).drive.run()
    for worker in ("a", "b"):
        teachers = [key.teacher for name, key in pool.given if name == worker]
        changes = sum(one != other for one, other in itertools.pairwise(teachers))
        assert changes <= 1


def test_workers_that_die_and_join_lose_nothing() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        joins = {f"w{number}": rng.uniform(0, 20) for number in range(6)} | {"last": 1.0}
        dies = {f"w{number}": rng.uniform(5, 30) for number in range(6)}
        pool = MadeUpPool(joins, dies, w1=0.3, w2=3.0)
        run = Run(pool, _parts(2, 12, 3), ["t0", "t1"])
        run.drive.run()
        assert len(run.taken) == len(set(run.taken)) == 2 * 15 + 2


def test_a_hanging_worker_does_not_hold_up_the_end() -> None:
    pool = MadeUpPool({"a": 0, "b": 0}, b=1e-6)
    run = Run(pool, _parts(1, 8))
    run.drive.run()
    assert pool.now < 30
    assert len(run.taken) == 8
    assert max(Counter(key for _, key in pool.given).values()) == 2  # given out twice, and not more often


def test_the_last_pieces_go_to_idle_workers() -> None:
    pool = MadeUpPool({"a": 0, "b": 0})
    Run(pool, _parts(1, 3)).drive.run()
    assert pool.now <= 3.0


def _refusal(kind: str = "MismatchError") -> Failed:
    return Failed(kind, "it has torch 1.0, the driver has 2.0", "Install the same.", for_good=True)


def test_a_worker_that_does_not_fit_is_named_and_left_out() -> None:
    pool = MadeUpPool({"odd": 0, "a": 1})
    pool.refuses["odd"] = _refusal()
    run = Run(pool, _parts(1, 4))
    run.drive.run()
    assert "worker odd: it has torch 1.0, the driver has 2.0; this worker gets no more work" in run.told
    assert {worker for worker, _ in pool.given} == {"a"}


def test_if_no_worker_fits_the_reason_is_the_error() -> None:
    pool = MadeUpPool({"one": 0, "two": 0})
    pool.refuses |= {"one": _refusal(), "two": _refusal()}
    with pytest.raises(MismatchError, match=r"worker .*: it has torch 1.0") as caught:
        Run(pool, _parts(1, 4)).drive.run()
    assert caught.value.exit_code == 4
    assert caught.value.hint == "Install the same."


def test_a_worker_that_may_not_write_is_left_out_and_its_piece_runs_elsewhere() -> None:
    pool = MadeUpPool({"full": 0, "a": 0})
    pool.fails["full"] = _refusal("StorageError")
    run = Run(pool, _parts(1, 6))
    run.drive.run()
    assert len(run.taken) == 6
    alone = MadeUpPool({"full": 0})
    alone.fails["full"] = _refusal("StorageError")
    with pytest.raises(StorageError):
        Run(alone, _parts(1, 6)).drive.run()


def test_a_piece_that_fails_everywhere_is_an_error_that_names_it() -> None:
    pool = MadeUpPool({"a": 0, "b": 0})
    pool.fails["part-00002"] = Failed("KdcacheError", "RuntimeError: out of memory", "")
    with pytest.raises(KdcacheError, match=r"part-00002 of teacher 't0' failed 3 times; .*out of memory"):
        Run(pool, _parts(1, 6)).drive.run()


def test_an_error_of_the_data_stops_the_dump() -> None:
    pool = MadeUpPool({"a": 0, "b": 0})
    pool.fails["part-00002"] = Failed("NonFiniteError", "teacher 't0', text ab: NaN", "", of_worker=False)
    with pytest.raises(NonFiniteError, match="text ab: NaN"):
        Run(pool, _parts(1, 6)).drive.run()


def test_when_all_workers_die_the_error_says_so() -> None:
    with pytest.raises(KdcacheError, match="worker a died") as caught:
        Run(MadeUpPool({"a": 0}, {"a": 2.0}), _parts(1, 9)).drive.run()
    assert "it continues" in caught.value.hint
