"""One piece of work behind: in order, one at a time, and no error is lost."""

from __future__ import annotations

import threading

import pytest

from kdcache.dump.behind import BackgroundWriter


def test_actions_run_in_order_and_what_they_give_back_arrives() -> None:
    done: list[int] = []
    with BackgroundWriter[int]("test", done.append) as writer:
        for number in range(20):
            writer.start(lambda number=number: number * number)  # type: ignore[misc]
            assert done == [one * one for one in range(number)]
    assert done == [one * one for one in range(20)]


@pytest.mark.parametrize("last", [False, True])
def test_an_error_is_raised_at_the_next_action_or_at_the_end(last: bool) -> None:
    ran: list[str] = []

    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), BackgroundWriter[None]("test") as writer:
        writer.start(fail)
        if not last:
            writer.start(lambda: ran.append("next"))
            ran.append("went on")
    assert not ran


def test_without_a_thread_the_caller_runs_the_actions() -> None:
    ran: list[int] = []

    def fail() -> int:
        raise OSError("disk full")

    with BackgroundWriter[int]("test", ran.append, ahead=0) as writer:
        writer.start(threading.get_ident)
        assert ran == [threading.get_ident()]
        with pytest.raises(OSError, match="disk full"):
            writer.start(fail)


def test_after_an_error_of_the_caller_the_action_before_still_ends() -> None:
    go, ran = threading.Event(), []

    def slow() -> None:
        go.wait(5)
        ran.append("slow")

    with pytest.raises(RuntimeError, match="teacher"), BackgroundWriter[None]("test") as writer:
        writer.start(slow)
        go.set()
        raise RuntimeError("teacher")
    assert ran == ["slow"]
