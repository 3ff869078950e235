"""Memory that parts hand on: never two at a time, as long as anything refers to it, and no more than was in use."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.codecs.base import LayerSpec
from kdcache.loading.buffers import Buffers
from kdcache.loading.parts import Interleaved, layers_of
from tests.loading.test_loader import batches_of, cache_of, tokenizers  # noqa: F401 - a fixture


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 3)), max_size=30))
def test_no_two_arrays_share_memory_and_no_more_is_held_than_was_used(steps: list[tuple[int, int]]) -> None:
    buffers, held = Buffers(), dict[int, tuple[np.ndarray, int]]()
    for number, (size, dropped) in enumerate(steps):
        array = buffers.empty(size)
        assert array.shape == (size,) and array.dtype == np.uint8 and array.flags.writeable
        array[:] = number % 256
        held[number] = array, number % 256
        for key in list(held)[:dropped]:
            del held[key]
        del array
        assert buffers._used + sum(map(len, buffers._free)) <= buffers._most
        assert all((one == value).all() for one, value in held.values()), "nobody else wrote there"


VIEWS: dict[str, Callable[[Interleaved], Any]] = {
    "slice": lambda records: records.rows[1:3],
    "field": lambda records: records.blocks()[2].scales,
    "tensor": lambda records: layers_of(records.rows, records.dtype)[2][0],
    "memoryview": lambda records: records.bytes[3:9],
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_buffer_is_free_when_the_last_view_is_gone(kind: str) -> None:
    buffers = Buffers()
    records = Interleaved.empty({2: LayerSpec("none", 3, "int8")}, 4, buffers)
    first = records.rows.ctypes.data
    size = records.rows.nbytes
    view = VIEWS[kind](records)
    del records
    gc.collect()
    other = buffers.empty(size)
    assert other.ctypes.data != first
    del view, other
    gc.collect()
    one, two = buffers.empty(size), buffers.empty(size)
    assert first in (one.ctypes.data, two.ctypes.data)


def test_a_part_takes_the_memory_of_the_one_before() -> None:
    buffers = Buffers()
    array = buffers.empty(1000)
    place = array.ctypes.data
    del array
    for size in (1000, 1050, 900, 1062):  # within the sixteenth that a buffer is larger, and at most a quarter smaller
        array = buffers.empty(size)
        assert array.ctypes.data == place
        del array
    larger = buffers.empty(1063)
    assert buffers._used == 1063 + 1063 // 16 and not buffers._free
    buffers.clear()
    assert buffers._most == buffers._used
    del larger
    buffers.clear()
    assert not buffers._free and not buffers._returned and buffers._used == 0


def test_threads_may_take_and_drop() -> None:
    buffers, wrong = Buffers(), []

    def work(number: int) -> None:
        for turn in range(200):
            array = buffers.empty(500 + turn % 3)
            array[:] = number
            if not (array == number).all():
                wrong.append(turn)
            del array  # else a thread that takes the next one has two

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and buffers._most <= 4 * (502 + 502 // 16)


def test_epochs_need_no_more_memory_than_the_first(tokenizers: dict[str, Any]) -> None:  # noqa: F811
    cache = cache_of(tokenizers, count=160, part_size=8)
    source = batches_of(cache, tokenizers, window=2, memory_bytes=0)
    expected = [batch.text_ids.tobytes() for batch in source.batches(0)]
    most = source._decode.memory._most
    assert most > 0
    for _ in range(3):
        assert [batch.text_ids.tobytes() for batch in source.batches(0)] == expected
    assert source._decode.memory._most <= 1.5 * most  # threads may be a part further
    source.forget_parts()
    gc.collect()
    source.forget_parts()
    assert source._decode.memory._used == 0
