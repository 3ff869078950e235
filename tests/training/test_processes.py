"""Shares, sums and agreements of several processes; whole trainings are in ``tests/test_several_processes.py``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcache.errors import MismatchError, RecipeError
from kdcache.training import processes
from kdcache.training.processes import ALONE, Processes
from kdcache.training.row_gradients import RowGradients
from kdcache.training.seeding import own_seed, restore_own, rng_state, seed_everything
from kdcache.training.step_sums import StepSums
from tests.training.threads import Meeting, Thread, in_threads


@given(rows=st.integers(0, 50), world=st.integers(1, 9))
def test_shares_are_near_equal_and_cover_all_rows(rows: int, world: int) -> None:
    shares = [range(rows)[Processes(rank, world).share(rows)] for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_gradients_are_summed_and_a_parameter_without_one_stays_so() -> None:
    """AdamW would decay a parameter whose gradient is zero."""

    def step(own: Processes) -> tuple[list[Tensor | None], dict[str, float], bool]:
        parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
        parameters[0].grad = torch.full((2, 3), 1.0 + own.rank)
        if own.rank == 1:
            parameters[1].grad = torch.arange(4.0)
        values = {"loss": torch.tensor(0.5 + own.rank, dtype=torch.float64), "task": 2.0}
        sums, due = StepSums(own, parameters, torch.device("cpu")).add(values, due=own.first)
        return [parameter.grad for parameter in parameters], {name: float(each) for name, each in sums.items()}, due

    for gradients, sums, due in in_threads(3, step):
        assert torch.equal(gradients[0], torch.full((2, 3), 6.0))
        assert torch.equal(gradients[1], torch.arange(4.0))
        assert gradients[2] is None
        assert sums == {"loss": 4.5, "task": 6.0}
        assert due


@dataclass(frozen=True)
class Counting(Thread):
    """A process that notes how many numbers it adds up."""

    added: list[int] = field(default_factory=list)

    def add(self, tensors: Sequence[Tensor]) -> None:
        self.added.append(sum(tensor.numel() for tensor in tensors))
        super().add(tensors)


@pytest.mark.parametrize("tied", [False, True])
def test_of_word_embeddings_the_rows_that_any_process_read_are_summed(tied: bool) -> None:
    texts = [torch.tensor([[3, 3, 9]]), torch.tensor([[9, 1400], [0, 7]]), None]  # the third process has no row

    def gradient(mine: Sequence[Tensor | None], own: Counting | None) -> tuple[Tensor | None, list[int]]:
        generator = torch.Generator().manual_seed(0)
        words = nn.Embedding(1500, 4, _weight=torch.randn(1500, 4, generator=generator))
        rows = RowGradients(words)
        for ids in mine:
            if ids is not None:
                states = words(ids)
                loss = (states @ words.weight.T).logsumexp(-1).sum() if tied else states.square().sum()
                loss.backward()
        rows.gather()
        if own is not None:
            StepSums(own, [words.weight], torch.device("cpu"), rows).add({"loss": 1.0}, due=False)
        rows.close()
        return words.weight.grad, [] if own is None else own.added

    meeting = Meeting(3, seconds=20)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rank: gradient([texts[rank]], Counting(rank, 3, meeting)), range(3)))
    expected, _ = gradient(texts, None)
    assert expected is not None
    for summed, added in found:
        torch.testing.assert_close(summed, expected)
        assert added == [1500 * 4 + 1 if tied else 5 * 4 + 1]  # ids 0, 3, 7, 9 and 1400; the loss


def test_terms_that_one_process_does_not_have_are_added_by_name() -> None:
    given = [{"loss": 0.0}, {"loss": 1.0, "soft": 2.0, "hidden": 3.0}, {"loss": 1.0, "hidden": 4.0, "soft": 5.0}]

    def step(own: Processes) -> dict[str, float]:
        sums, due = StepSums(own, [], torch.device("cpu")).add(given[own.rank], due=False)
        assert not due
        return {name: float(value) for name, value in sums.items()}

    assert in_threads(3, step) == [{"loss": 2.0, "soft": 7.0, "hidden": 7.0}] * 3


def test_other_inputs_are_named_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node7")

    def begin(own: Processes) -> str:
        with pytest.raises(MismatchError) as caught:
            processes.start(own, {"data": "a", "cache": "b" if own.rank == 1 else "c"}, 3, [])
        return caught.value.message

    first, second = in_threads(2, begin)
    assert first == "the processes of this training differ in 'cache': b in process 1 on 'node7', c in process 0"
    assert second == "the processes of this training differ in 'cache': c in process 0 on 'node7', b in process 1"


def test_every_process_draws_its_own_numbers_and_one_alone_those_of_before() -> None:
    assert own_seed(7, ALONE) == 7
    seeds = [own_seed(seed, Processes(rank, 3), step) for seed in (0, 7) for rank in range(3) for step in (None, 1, 5)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == own_seed(0, Processes(0, 2))  # whatever their number


def test_generators_continue_where_the_number_of_processes_is_the_same() -> None:
    states, following = [], []
    for rank in range(2):
        seed_everything(own_seed(3, Processes(rank, 2)))
        states.append(rng_state())
        following.append((random.random(), float(torch.rand(()))))
    saved = {"rng": states[0], "processes": states}
    for rank in range(2):
        assert restore_own(saved, 3, Processes(rank, 2), 9) == ""
        assert (random.random(), float(torch.rand(()))) == following[rank]
    note = restore_own(saved, 3, ALONE, 9)
    assert note.startswith("the number of processes is 1 now, and was 2 when the checkpoint was written")
    assert random.random() not in (following[0][0], following[1][0])
    restore_own(saved, 3, ALONE, 9)
    again = float(torch.rand(()))
    restore_own(saved, 3, ALONE, 9)
    assert float(torch.rand(())) == again
    assert restore_own({"rng": states[0]}, 3, ALONE, 9) == ""  # as 0.1.0 wrote it
    assert (random.random(), float(torch.rand(()))) == following[0]


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert processes.join() == ALONE == processes.current()
    processes.check_alone("kdcache run")
    assert processes.ending(4, lost=False) == (True, 4)
    processes.close(spoke=True, lost=False)
    monkeypatch.setenv("RANK", "0")
    assert processes.asked() == 4
    with pytest.raises(RecipeError, match="kdcache run runs in one process; it was started in 4"):
        processes.check_alone("kdcache run")
    weight = torch.ones(3)
    ALONE.add([weight])
    ALONE.copy_from_first([weight])
    assert torch.equal(weight, torch.ones(3))
    assert (ALONE.sums([2, 3]), ALONE.largest([2, 3]), ALONE.gathered("a")) == ([2, 3], [2, 3], ["a"])
    assert ALONE.from_first(lambda: 5) == 5
