"""Where batches are made: in a thread while the consumer works, in its own thread while it does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from kdcache.loading import prefetch
from kdcache.loading.prefetch import DECIDED_EVERY, Balance, where_it_pays

OURS = "kdcache-batches"


class Scripted(Balance):
    """Decides as it is told; beyond that a thread makes the items."""

    def __init__(self, answers: Sequence[bool], *, in_thread: bool = True) -> None:
        super().__init__()
        self.answers, self.in_thread = iter(answers), in_thread

    def add(self, _working: float, _making: float) -> bool:
        self.in_thread = next(self.answers, True)
        return self.in_thread


def made_in(count: int, closed: list[bool], fail_at: int = -1) -> Iterator[tuple[int, str]]:
    """Numbers, each with the name of the thread that made it."""
    try:
        for number in range(count):
            if number == fail_at:
                raise RuntimeError("made to fail")
            yield number, threading.current_thread().name
    finally:
        closed.append(True)


@given(
    answers=st.lists(st.booleans(), max_size=40),
    in_thread=st.booleans(),
    count=st.integers(0, 40),
    stop=st.integers(0, 45),
    fail_at=st.integers(-1, 45),
)
def test_items_and_errors_are_the_same_wherever_they_are_made(
    answers: list[bool], in_thread: bool, count: int, stop: int, fail_at: int
) -> None:
    closed: list[bool] = []
    balance = Scripted(answers, in_thread=in_thread)
    items, seen = where_it_pays(lambda: made_in(count, closed, fail_at), balance), []
    try:
        for number, _ in items:
            if len(seen) == stop:
                break
            seen.append(number)
    except RuntimeError:
        assert len(seen) == fail_at
    else:
        assert len(seen) == min(stop, count)
    finally:
        items.close()
    assert seen == list(range(len(seen)))
    assert closed == [True] or not seen
    assert OURS not in [thread.name for thread in threading.enumerate()]


def test_a_consumer_that_does_nothing_makes_them_itself() -> None:
    balance = Scripted([True] * 5 + [False] * 10 + [True] * 14 + [False] * 2)
    threads = [name for _, name in where_it_pays(lambda: made_in(30, []), balance)]
    own = threading.current_thread().name
    begin, end = threads.index(own), len(threads) - threads[::-1].index(own)
    assert 6 <= begin <= 6 + prefetch.BUNDLES_AHEAD + 1, "what the thread had made comes first"
    assert set(threads[begin:end]) == {own} and set(threads[:begin] + threads[end:]) == {OURS}
    assert end == 16
    threads = [name for _, name in where_it_pays(lambda: made_in(30, []), Scripted([False] * 30, in_thread=False))]
    assert set(threads) == {own}, "it was found in the epoch before"


def test_the_balance() -> None:
    def after(*times: tuple[float, float], balance: Balance | None = None) -> Balance:
        balance = balance or Balance()
        for working, making in times:
            balance.add(working, making)
        return balance

    idle, waiting, working = ((0.1, 1.0),), ((1.5, 1.0),), ((5.0, 1.0),)
    assert not after(*working * (DECIDED_EVERY - 1)).in_thread, "not by a few"
    assert after(*working * 100).in_thread
    assert not after(*idle * 100).in_thread
    threaded = after(*working * DECIDED_EVERY, *idle * (DECIDED_EVERY - 1))
    assert threaded.in_thread, "not by a few"
    assert not after(*idle, balance=threaded).in_thread
    tried = after(*working * DECIDED_EVERY, *waiting * DECIDED_EVERY)
    assert not tried.in_thread, "it may have waited for the interpreter only"
    after(*waiting * DECIDED_EVERY, balance=tried)
    assert tried.in_thread, "it did work"
    after(*waiting * (2 * DECIDED_EVERY - 1), balance=tried)
    assert tried.in_thread, "so it is tried after more items"
    after(*waiting, balance=tried)
    assert not tried.in_thread
    after(*idle * 10 * DECIDED_EVERY, balance=tried)
    assert not tried.in_thread
