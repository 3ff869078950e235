"""Arrays: the same bytes as zarr-python writes, read back exactly, every flipped bit found."""

from __future__ import annotations

import json

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from kdcache.cache import arrays
from kdcache.cache.arrays import (
    ArrayDamageError,
    array_metadata,
    chunk_count,
    chunk_rows,
    decode_shard,
    encode_shard,
    shard_bytes,
)
from kdcache.cache.canonical import canonical_json

SHAPES = [(5, 2), (1, 1), (7,), (300_000, 3), (2_000_000,), (40_000, 128)]


class Bytes:
    """A file in memory."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def readinto(self, view: memoryview) -> None:
        view[:] = self._data[self._position : self._position + len(view)]
        self._position += len(view)


def encoded(values: np.ndarray) -> bytes:
    return b"".join(bytes(buffer) for buffer in encode_shard(values))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_zarr(shape: tuple[int, ...], dtype: str) -> None:
    values = (np.random.default_rng(0).standard_normal(shape) * 50).clip(-127, 127).astype(dtype)
    rows, count = chunk_rows(shape, values.itemsize), chunk_count(shape, values.itemsize)
    stored: dict = {}
    array = zarr.create_array(
        MemoryStore(stored),
        shape=shape,
        dtype=dtype,
        chunks=(rows, *shape[1:]),
        shards=(rows * count, *shape[1:]),
        compressors=[Crc32cCodec()],
        fill_value=-128 if dtype == "int8" else np.nan,
        dimension_names=["token", "dim"][: len(shape)],
    )
    array[...] = values
    data = encoded(values)
    assert data == stored[arrays.shard_name(len(shape))].to_bytes()
    assert len(data) == shard_bytes(shape, values.itemsize)
    assert json.loads(array_metadata(shape, dtype)) == json.loads(stored["zarr.json"].to_bytes())
    assert array_metadata(shape, dtype) == canonical_json(json.loads(array_metadata(shape, dtype)))
    assert np.array_equal(decode_shard(Bytes(data), shape, dtype), values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_chunks_are_at_most_a_mebibyte_and_at_least_half_where_there_are_several(
    shape: tuple[int, ...], itemsize: int
) -> None:
    size = chunk_rows(shape, itemsize) * itemsize * int(np.prod(shape[1:]))
    assert size <= 1 << 20
    assert chunk_count(shape, itemsize) == 1 or size >= 1 << 19


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.int8]), hnp.array_shapes(min_dims=1, max_dims=2, max_side=40)
    )
)
def test_round_trip_is_exact(values: np.ndarray) -> None:
    decoded = decode_shard(Bytes(encoded(values)), values.shape, values.dtype.name)
    assert decoded.tobytes() == values.tobytes()


def test_no_rows_make_no_shard() -> None:
    assert shard_bytes((0, 4), 4) == 0
    assert decode_shard(Bytes(b""), (0, 4), "float32").shape == (0, 4)
    group = zarr.open(MemoryStore({"zarr.json": _buffer(array_metadata((0, 4), "int8"))}), mode="r")
    assert group.shape == (0, 4)


def test_every_flipped_bit_is_found() -> None:
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    data = encoded(values)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArrayDamageError):
            decode_shard(Bytes(bytes(damaged)), values.shape, "float32")


@given(
    values=hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.int8]), hnp.array_shapes(min_dims=1, max_dims=2, max_side=40)
    ),
    chunk=st.integers(1, 64),
    together=st.integers(1, 5),
)
def test_values_are_read_into_fields_of_records(values: np.ndarray, chunk: int, together: int) -> None:
    """Whatever the number of chunks and blocks; what lies beside the field stays."""
    table = np.zeros(len(values), np.dtype([("a", "i2"), ("it", values.dtype, values.shape[1:]), ("z", "u1")]))
    table["a"], table["z"] = 7, np.arange(len(values)) % 256
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", chunk)
        patch.setattr(arrays, "_CHUNKS_TOGETHER", together)
        found = decode_shard(Bytes(encoded(values)), values.shape, values.dtype.name, table["it"])
    assert np.shares_memory(found, table) and found.tobytes() == values.tobytes()
    assert (table["a"] == 7).all() and np.array_equal(table["z"], np.arange(len(values)) % 256)


def test_every_flipped_bit_is_found_on_its_way_into_a_field(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(-10, 11, dtype=np.int8).reshape(7, 3)
    table = np.zeros(7, np.dtype([("it", np.int8, (3,)), ("scale", np.float32)]))
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 6)  # two rows
    data = encoded(values)
    decode_shard(Bytes(data), values.shape, "int8", table["it"])
    assert np.array_equal(table["it"], values)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArrayDamageError, match=r"rows \d to \d do not|index of its chunks"):
            decode_shard(Bytes(bytes(damaged)), values.shape, "int8", table["it"])


def _buffer(data: bytes) -> object:
    return zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(data)
