"""The remote that fails on purpose: its faults are what they say, repeat with the seed, and are counted."""

from __future__ import annotations

import pytest

from kdcache.errors import RemoteError
from kdcache.testing.faults import Died
from kdcache.testing.faulty_remote import Faults, FaultyRemote
from kdcache.testing.memory_remote import MemoryRemote
from kdcache.testing.remote_contract import RemoteContract


class TestCounting(RemoteContract):
    @pytest.fixture
    def remote(self) -> FaultyRemote:
        return FaultyRemote(MemoryRemote())


def outcomes(seed: int) -> tuple[list[str], FaultyRemote]:
    remote = FaultyRemote(MemoryRemote(block=1000), Faults.of_all(0.5), seed=seed)
    found = []
    for number in range(200):
        key = f"files/{number % 7}"
        try:
            remote.write(key, bytes(5000))
            found.append("written")
            found.append(str(sum(len(block) for block in remote.read(key))))
        except RemoteError as error:
            found.append(error.message)
    return found, remote


def test_faults_repeat_with_the_seed_and_come_at_their_rate() -> None:
    found, remote = outcomes(1)
    assert found == outcomes(1)[0]
    assert found != outcomes(2)[0]
    total = remote.requests.total()
    assert abs(remote.struck.total() / total - 0.5) < 0.1
    assert {"error", "timeout", "truncated", "slow", "lost"} <= set(remote.struck)
    assert any(one.isdigit() and int(one) < 5000 for one in found), "a body that ends early without a word"
    assert any("broke off" in one for one in found)


def test_a_lost_answer_leaves_the_work_done_and_an_error_does_not() -> None:
    memory = MemoryRemote()
    with pytest.raises(RemoteError):
        FaultyRemote(memory, Faults(lost=1.0)).write("one", b"x")
    with pytest.raises(RemoteError):
        FaultyRemote(memory, Faults(error=1.0)).write("two", b"x")
    assert set(memory.objects) == {"one"}


def test_dying_at_a_request_is_for_ever() -> None:
    remote = FaultyRemote(MemoryRemote(), die_at=3)
    remote.write("one", b"12345")
    assert b"".join(remote.read("one")) == b"12345"
    for _ in range(2):
        with pytest.raises(Died):
            remote.head("one")
    assert remote.requests == {"write": 1, "read": 1, "head": 2}
    assert (remote.up["write"], remote.down["read"]) == (5, 5)
    assert remote.log == ["write one", "read one", "head one", "head one"]
