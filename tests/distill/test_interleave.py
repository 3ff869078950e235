"""Layers side by side: whatever dtypes and widths, each comes back as it was, also from rows in another order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache.blocks import HiddenBlock
from kdcache.distill.interleave import Interleaved, layers_of

WIDTHS = st.lists(st.tuples(st.sampled_from(["float32", "float16", "int8", "uint8"]), st.integers(1, 9)), min_size=1, max_size=4)


@given(widths=WIDTHS, rows=st.integers(0, 5), seed=st.integers(0, 99))
def test_every_layer_comes_back(widths: list[tuple[str, int]], rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = {
        layer: HiddenBlock(
            rng.integers(0, 100, (rows, dim)).astype(dtype), rng.random(rows, np.float32) if dtype == "int8" else None
        )
        for layer, (dtype, dim) in enumerate(widths, start=3)
    }
    mixed = Interleaved.of(blocks)
    order = rng.permutation(rows)
    found = layers_of(mixed.rows[order], mixed.dtype)
    assert found.keys() == blocks.keys()
    for layer, block in blocks.items():
        values, scales = found[layer]
        assert values.numpy().dtype == block.values.dtype
        assert np.array_equal(values.numpy(), block.values[order])
        assert (scales is None) == (block.scales is None)
        assert scales is None or block.scales is None or np.array_equal(scales.numpy(), block.scales[order])


def test_a_layer_alone_is_not_copied() -> None:
    values = np.zeros((4, 3), np.float16)
    assert np.shares_memory(Interleaved.of({6: HiddenBlock(values)}).rows, values)
