"""Layers side by side: whatever dtypes and widths, each comes back as it was, also from rows in another order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.codecs.base import LayerSpec
from kdcache.codecs.registry import format_of
from kdcache.loading import parts as interleave
from kdcache.loading.parts import Interleaved, gather_spans, layers_of

LAYERS = st.lists(
    st.tuples(st.sampled_from(["float32", "float16", "int8", "float8"]), st.integers(1, 9)), min_size=1, max_size=4
)


@given(layers=LAYERS, rows=st.integers(0, 5), seed=st.integers(0, 99))
def test_every_layer_comes_back(layers: list[tuple[str, int]], rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    specs = {layer: LayerSpec("none", dim, dtype) for layer, (dtype, dim) in enumerate(layers, start=3)}
    mixed = Interleaved.empty(specs, rows)
    written = {}
    for layer, block in mixed.blocks().items():
        arrays = [array for array in (block.values, block.scales) if array is not None]
        for array in arrays:
            array[...] = rng.integers(0, 100, array.shape)
        written[layer] = [array.copy() for array in arrays]
    order = rng.permutation(rows)
    found = layers_of(mixed.rows[order], mixed.dtype)
    assert found.keys() == specs.keys()
    for layer, spec in specs.items():
        stored = [array.numpy() for array in found[layer] if array is not None]
        assert [(array.shape, array.dtype) for array in stored] == [
            (array.shape, np.dtype(array.dtype)) for array in format_of(spec).arrays(spec, rows)
        ]
        for one, other in zip(stored, written[layer], strict=True):
            assert np.array_equal(one, other[order])


def test_a_layer_alone_is_not_copied() -> None:
    values = np.zeros((4, 3), np.float16)
    assert np.shares_memory(Interleaved.of({"values 6": values}).rows, values)


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
