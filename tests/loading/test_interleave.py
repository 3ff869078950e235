"""Layers side by side: whatever dtypes and widths, each comes back as it was, also from rows in another order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.codecs.base import HiddenBlock
from kdcache.loading import parts as interleave
from kdcache.loading.parts import Interleaved, gather_spans, layers_of

WIDTHS = st.lists(
    st.tuples(st.sampled_from(["float32", "float16", "int8", "uint8"]), st.integers(1, 9)), min_size=1, max_size=4
)


@given(widths=WIDTHS, rows=st.integers(0, 5), seed=st.integers(0, 99))
def test_every_layer_comes_back(widths: list[tuple[str, int]], rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = {
        layer: HiddenBlock(
            rng.integers(0, 100, (rows, dim)).astype(dtype), rng.random(rows, np.float32) if dtype == "int8" else None
        )
        for layer, (dtype, dim) in enumerate(widths, start=3)
    }
    mixed = Interleaved.of_layers(blocks)
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
    assert np.shares_memory(Interleaved.of_layers({6: HiddenBlock(values)}).rows, values)


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    choices=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 6)), max_size=8),
    limit=st.sampled_from([0, interleave.GATHERED_AS_BYTES]),
)
def test_rows_of_several_parts_are_joined_span_by_span(
    sizes: list[int], choices: list[tuple[int, int, int]], limit: int
) -> None:
    rng = np.random.default_rng(len(sizes))
    parts = [
        Interleaved.of({"a": rng.random((size, 3), np.float32), "b": rng.integers(0, 9, size, np.int8)})
        for size in sizes
    ]
    picked = [(part % len(sizes), min(a, b), max(a, b)) for part, a, b in choices]
    picked = [(part, min(first, sizes[part]), min(last, sizes[part])) for part, first, last in picked]
    wanted = [parts[part].rows[row].tolist() for part, first, last in picked for row in range(first, last)]
    width = parts[0].dtype.itemsize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interleave, "GATHERED_AS_BYTES", limit)
        spans = [(part, first * width, last * width) for part, first, last in picked]
        found = gather_spans([part.bytes for part in parts], spans, len(wanted), width)
    assert found.tolist() == wanted
    assert found.flags.writeable, "torch takes no other"
