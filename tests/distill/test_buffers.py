"""Memory that is used again: never while anything still looks at it, in whatever way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kdcache.distill.buffers import Buffers

LOOKS: dict[str, Callable[[np.ndarray], object]] = {
    "the array": lambda array: array,
    "a slice of a slice": lambda array: array[1:][:1],
    "another dtype": lambda array: array.view(np.int32),
    "a tensor": torch.from_numpy,
    "a slice of a tensor": lambda array: torch.from_numpy(array.view(np.float32))[1:, :1],
    "a tensor as an array": lambda array: torch.from_numpy(array).numpy(),
    "a memory view": memoryview,
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_looked_at_is_left_alone(look: str) -> None:
    buffers = Buffers()
    (first,) = buffers.arrays([(2, 64)])
    place = first.ctypes.data
    first[:] = 7
    seen: list[object] = [LOOKS[look](first)]
    del first
    (other,) = buffers.arrays([(2, 64)])
    other[:] = 9
    assert other.ctypes.data != place
    assert (np.asarray(seen[0]).view(np.uint8) == 7).all()
    del other
    seen.clear()
    assert place in {buffers.arrays([(2, 64)])[0].ctypes.data for _ in range(2)}


def test_a_stream_of_batches_needs_as_many_blocks_as_are_alive() -> None:
    buffers = Buffers()
    alive: list[list[np.ndarray]] = []
    places = set()
    for number in range(50):
        arrays = buffers.arrays([(3 + number % 3, 100), (2, 64)])
        assert [array.shape for array in arrays] == [(3 + number % 3, 100), (2, 64)]
        arrays[0][:], arrays[1][:] = number, 255 - number
        alive = [*alive[-3:], arrays]
        places.add(arrays[0].ctypes.data)
        assert all((one[0] == one[0][0, 0]).all() and one[1][0, 0] == 255 - one[0][0, 0] for one in alive)
    assert len(places) <= 8


def test_more_than_the_limit_is_handed_out_but_not_kept() -> None:
    buffers = Buffers(limit=1000)
    kept = [buffers.arrays([(1, 600)])[0] for _ in range(4)]
    assert len({array.ctypes.data for array in kept}) == 4
    assert sum(map(len, buffers._blocks)) <= 1000
