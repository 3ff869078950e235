"""Who lives, who is dead, and who must know that it was taken for dead."""

from __future__ import annotations

import threading

import pytest

from kdcache.errors import LockedError, RemoteError
from kdcache.share.intents import LeaseTiming, alive, hold, refuse_if_alive, wait_until_none
from kdcache.testing.memory_remote import MemoryRemote
from tests.share.worlds import World


def test_alive_while_held_and_gone_afterwards(world: World) -> None:
    with hold(world.remote, "intent", world.timing):
        assert len(alive(world.remote, "intent", world.timing)) == 1
        assert alive(world.remote, "mark", world.timing) == []
        with pytest.raises(LockedError, match="a push is in progress on memory://remote, by process"):
            refuse_if_alive(world.remote, "intent", world.timing)
    assert world.remote.objects == {}


def test_a_dead_owner_counts_for_nothing_after_its_time(world: World) -> None:
    held = hold(world.remote, "mark", world.timing)
    held.__enter__()
    world.seconds += world.timing.ttl
    assert alive(world.remote, "mark", world.timing)
    world.seconds += 1
    assert not alive(world.remote, "mark", world.timing)


def test_an_owner_takes_itself_for_dead_before_anybody_else_does(world: World) -> None:
    with hold(world.remote, "intent", world.timing) as lease:
        epoch = lease.epoch
        while lease.holds(epoch):
            assert alive(world.remote, "intent", world.timing)
            world.seconds += 1
        assert alive(world.remote, "intent", world.timing)
        lease.renew()
        assert not lease.holds(epoch)  # a gap stays a gap
        assert lease.holds(lease.epoch)


def test_a_gap_that_a_late_renewal_closed_is_still_seen(world: World) -> None:
    with hold(world.remote, "intent", world.timing) as lease:
        epoch = lease.epoch
        world.seconds += 500
        lease.renew()
        assert not lease.holds(epoch)


def test_beats_keep_it_alive(world: World) -> None:
    with hold(world.remote, "intent", world.timing) as lease:
        epoch = lease.epoch
        for _ in range(100):
            world.seconds += 29
            lease.beat()
        assert lease.holds(epoch)
        assert alive(world.remote, "intent", world.timing)


def test_waiting_ends_when_the_other_dies_and_keeps_the_own_one_alive(world: World) -> None:
    dead = hold(world.remote, "mark", world.timing)
    dead.__enter__()
    notes: list[str] = []
    with hold(world.remote, "intent", world.timing) as lease:
        wait_until_none(world.remote, "mark", world.timing, lease, notes.append)
        assert alive(world.remote, "intent", world.timing)
    assert len(notes) == 1


def test_patience_ends(world: World) -> None:
    with hold(world.remote, "mark", world.timing) as mark, hold(world.remote, "intent", world.timing) as lease:

        def sleep(seconds: float) -> None:
            world.seconds += seconds
            mark.beat()

        timing = LeaseTiming(clock=world.timing.clock, sleep=sleep, background=False)
        with pytest.raises(LockedError, match="a gc is in progress"):
            wait_until_none(world.remote, "mark", timing, lease, lambda _: None)


def test_renewal_in_the_background_survives_a_remote_that_fails_for_a_while() -> None:
    class Flaky(MemoryRemote):
        writes = 0
        enough = threading.Event()

        def write(self, key: str, source: object) -> None:
            self.writes += 1
            if self.writes in (2, 3):
                raise RemoteError("not now")
            super().write(key, source)  # type: ignore[arg-type]
            if self.writes > 4:
                self.enough.set()

    remote = Flaky()
    with hold(remote, "intent", LeaseTiming(renew=0.005)):
        assert remote.enough.wait(10)
    assert remote.objects == {}
    assert not [thread for thread in threading.enumerate() if thread.name == "kdcache-intent"]
