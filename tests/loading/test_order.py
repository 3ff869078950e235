"""The order of an epoch: complete, local to a window of parts, and a pure function of three integers."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache.spec import Settings
from kdcache.loading import order
from kdcache.loading.choice import chosen_window
from kdcache.loading.order import BatchSettings, Epochs, _stable_order, epoch_order, step_count, step_rows
from kdcache.loading.prefetch import PartLifetimes


def parts_of(texts: int, part_size: int, seed: int = 0) -> np.ndarray:
    """Examples that lie over parts in no order, as they do after a seeded shuffle of the texts."""
    return np.random.default_rng(seed).permutation(np.arange(texts) // part_size)


@given(
    st.lists(st.integers(0, 5), max_size=200),
    st.integers(0, 2**31),
    st.integers(0, 50),
    st.integers(1, 9),
    st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_each_example_comes_exactly_once(parts: list[int], seed: int, epoch: int, window: int, batch: int) -> None:
    order = epoch_order(np.array(parts, np.int32), seed=seed, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(len(parts)))
    steps = [step_rows(order, step, batch) for step in range(step_count(len(order), batch))]
    assert np.concatenate([np.empty(0, np.int64), *steps]).tolist() == order.tolist()
    assert all(len(rows) for rows in steps)


def test_the_window_all_is_a_uniform_shuffle() -> None:
    parts = parts_of(8192, 256)
    orders = [epoch_order(parts, seed=0, epoch=epoch, window="all") for epoch in range(8)]
    assert all(sorted(order.tolist()) == list(range(8192)) for order in orders)
    ranks = np.argsort(np.stack(orders), axis=1)
    assert np.abs(np.corrcoef([np.arange(8192), *ranks]) - np.eye(9)).max() < 4 / 8192**0.5
    assert (
        np.mean([len(set(parts[order[:32]].tolist())) for order in orders]) > 18
    )  # of 32 rows from 32 parts: 20.4 expected


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_share_each_step_whatever_their_number(world: int) -> None:
    order = epoch_order(parts_of(1000, 100), seed=3, epoch=1, window=4)
    for step in range(step_count(len(order), 32)):
        shares = [step_rows(order, step, 32, rank=rank, world=world) for rank in range(world)]
        assert np.concatenate(shares).tolist() == step_rows(order, step, 32).tolist()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(examples=st.integers(0, 60), world=st.integers(1, 5), more=st.integers(0, 12), first=st.integers(0, 3))
def test_with_every_row_the_steps_are_those_of_one_process(examples: int, world: int, more: int, first: int) -> None:
    """The last step too, of which some processes may have no row; these have no batch for it."""
    parts = np.zeros(examples, np.int32)
    alone = Epochs(parts, BatchSettings(world + more, 8))
    order = alone.order(0)
    ranks = [Epochs(parts, BatchSettings(world + more, 8, rank=r, world=world, every_row=True)) for r in range(world)]
    found: dict[int, list[int]] = {step: [] for step in range(first, alone.steps)}
    for own in ranks:
        assert own.steps == alone.steps
        steps = own.steps_here(order, first)
        for step in steps:
            assert len(own.rows(order, step))
            found[step] += own.rows(order, step).tolist()
        assert set(range(first, own.steps)) - set(steps) <= {own.steps - 1}
        rows, of_steps = own.shares(order, first)
        assert rows.tolist() == [row for step in steps for row in own.rows(order, step).tolist()]
        assert of_steps.tolist() == [step for step in steps for _ in own.rows(order, step)]
    assert found == {step: alone.rows(order, step).tolist() for step in found}


@pytest.mark.parametrize(("window", "part_size"), [(1, 256), (2, 512), (8, 1024)])
def test_batches_draw_from_a_sliding_window(window: int, part_size: int) -> None:
    parts = parts_of(20 * part_size, part_size)
    order = epoch_order(parts, seed=0, epoch=0, window=window)
    batches = [set(parts[step_rows(order, step, 32)].tolist()) for step in range(step_count(len(order), 32))]
    assert len(batches[0]) == 1, "the first batch waits for more than one part"
    assert max(map(len, batches)) <= window + 1
    open_parts, closed = set(), set()
    last_use = {part: step for step, batch in enumerate(batches) for part in batch}
    for step, batch in enumerate(batches):
        assert not batch & closed, "a part is needed again after its last example was out"
        open_parts |= batch
        assert len(open_parts - closed) <= window + 2
        closed |= {part for part in open_parts if last_use[part] == step}


def test_epochs_and_seeds_differ_and_a_part_is_spread_over_its_window() -> None:
    parts = parts_of(8192, 1024)
    base = epoch_order(parts, seed=0, epoch=0, window=4)
    assert not np.array_equal(base, epoch_order(parts, seed=0, epoch=1, window=4))
    assert not np.array_equal(base, epoch_order(parts, seed=1, epoch=0, window=4))
    places = np.flatnonzero(parts[base] == parts[base[4096]])
    assert np.ptp(places) > 2 * 1024


def test_the_order_is_that_of_every_other_machine() -> None:
    """A golden order: it may change with neither numpy nor kdcache, or runs could not be continued elsewhere."""
    order = epoch_order(np.repeat(np.arange(4), 5), seed=7, epoch=2, window=2)
    assert order.tolist() == GOLDEN


GOLDEN = [14, 10, 11, 12, 8, 6, 5, 7, 13, 4, 0, 9, 1, 3, 2, 18, 15, 17, 19, 16]


@pytest.mark.parametrize("distinct", [1, 3, 900, 10**9])
def test_equal_keys_keep_their_order(distinct: int) -> None:
    """A resumed epoch needs the order that 0.1.0 gave, also where two of millions of keys are equal."""
    key = np.random.default_rng(distinct).integers(0, distinct, 1000).astype(np.float64)
    assert _stable_order(key).tolist() == np.argsort(key, kind="stable").tolist()
    assert _stable_order(key[:0]).tolist() == []


@pytest.mark.parametrize("distinct", [1, 2, 700, 10**9])
def test_many_keys_are_ordered_in_pieces_as_all_at_once(distinct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_MANY", 64)
    monkeypatch.setattr(order, "_ROWS_AT_ONCE", 300)
    key = np.random.default_rng(distinct).integers(0, distinct, 5000) / distinct * 7.3 + 2
    assert order._order_in_pieces(key).tolist() == np.argsort(key, kind="stable").tolist()


@pytest.mark.parametrize("window", [1, 3, "all"])
@pytest.mark.parametrize("transfer", [False, True])
def test_a_large_epoch_has_the_order_of_its_definition(
    window: Any, transfer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(3000, 100).astype(np.int32)
    logits_only = parts % 5 == 4 if transfer else None
    wanted = epoch_order(parts, seed=2, epoch=3, window=window, logits_only=logits_only)
    assert len(wanted) < order._MANY
    monkeypatch.setattr(order, "_MANY", 64)
    monkeypatch.setattr(order, "_ROWS_AT_ONCE", 300)
    found = epoch_order(parts, seed=2, epoch=3, window=window, logits_only=logits_only)
    assert found.tolist() == wanted.tolist() and found.dtype == wanted.dtype
    epochs = Epochs(parts, BatchSettings(8, 8, window=window))
    assert epochs.parts_of(found).tolist() == parts[found].tolist()


def test_lifetimes_are_first_and_last_step_of_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_ROWS_AT_ONCE", 7)
    parts, steps = np.random.default_rng(0).integers(0, 9, 60) * 2, np.arange(60) // 4
    found = PartLifetimes.of(parts, steps)
    assert found.first == {part: steps[parts == part].min() for part in set(parts.tolist())}
    assert found.last == {part: steps[parts == part].max() for part in set(parts.tolist())}
    assert found.order == tuple(sorted(found.first, key=lambda part: (found.first[part], part)))
    assert order.distinct_parts(parts) == sorted(set(parts.tolist())) and order.distinct_parts(parts[:0]) == []


def test_another_process_finds_the_same_order() -> None:
    code = (
        "import numpy as np; from kdcache.loading.order import epoch_order;"
        "print(epoch_order(np.arange(300) // 50, seed=11, epoch=4, window=3).tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(epoch_order(np.arange(300) // 50, seed=11, epoch=4, window=3).tolist())


@pytest.mark.parametrize(
    ("texts", "part_size", "window"),
    [
        (10**7, 16384, 2),
        (5 * 10**6, 8192, 4),
        (10**7, 8192, 4),  # a cache of five million texts that grew
        (10**7, 4096, 8),  # of 0.1.0
        (10**6, 16384, 8),  # somebody chose it
        (10**7, 65536, 8),
        (100, 4, 8),
    ],
)
def test_a_window_that_nobody_chose_has_as_many_texts_whatever_the_parts(
    texts: int, part_size: int, window: int
) -> None:
    parts = [SimpleNamespace(texts=texts // 4)] * 4
    cache: Any = SimpleNamespace(settings=Settings(0, part_size), parts=parts)
    assert chosen_window(cache) == window
    assert chosen_window(None) == 8
