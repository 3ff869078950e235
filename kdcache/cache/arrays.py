"""Encodes and decodes the zarr arrays in ``hidden/``: the same bytes, whatever version of zarr is installed.

The bytes are those that zarr-python writes for a sharded array: one shard of inner chunks, with a crc32c on each chunk
and on the index. A test compares them. This module has its own encoder because digests must not depend on the installed
version of zarr. It has its own decoder because the size of a shard follows from its shape: the decoder reads into the
result, checks every chunk, and never allocates the size that a file claims.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import google_crc32c
import numpy as np

from kdcache.cache.canonical import canonical_json

if TYPE_CHECKING:
    from kdcache.files import Buffer

CHUNK_BYTES = 1 << 20  # largest size of an inner chunk; at least half of it if an array has several
_CHUNKS_TOGETHER = 4  # larger blocks leave the processor's cache
_CRC = 4
_INDEX_ENTRY = 16  # offset and size, uint64 each
_FILLS = {"int8": -128, "uint8": 255}  # in int8 no code has this value, in uint8 one may; NaN for other dtypes


class Source(Protocol):
    """A file that is read from front to back."""

    def readinto(self, view: memoryview) -> None: ...


class ArrayDamageError(ValueError):
    """A chunk or the index of a shard does not match its checksum."""


def chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Rows of one inner chunk: the array is divided evenly into as few chunks of at most 1 MiB as possible."""
    rows = shape[0]
    row_bytes = itemsize * int(np.prod(shape[1:], dtype=np.int64))
    count = max(1, -(-rows // max(1, CHUNK_BYTES // max(1, row_bytes))))
    return max(1, -(-rows // count))


def chunk_count(shape: tuple[int, ...], itemsize: int) -> int:
    """Number of inner chunks of an array; 0 if it has no rows, and then there is no shard."""
    return -(-shape[0] // chunk_rows(shape, itemsize))


def shard_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Size of the shard file of an array."""
    count = chunk_count(shape, itemsize)
    chunk = itemsize * chunk_rows(shape, itemsize) * int(np.prod(shape[1:], dtype=np.int64))
    return count * (chunk + _CRC + _INDEX_ENTRY) + _CRC if count else 0


def shard_name(dimensions: int) -> str:
    """Path of the only shard inside the directory of an array."""
    return "c" + "/0" * dimensions


def group_metadata() -> bytes:
    """The ``zarr.json`` of a part: a group without attributes."""
    return canonical_json({"attributes": {}, "node_type": "group", "zarr_format": 3})


@functools.lru_cache(maxsize=4096)  # layers of a part are alike
def array_metadata(shape: tuple[int, ...], dtype: str) -> bytes:
    """The ``zarr.json`` of an array; a reader accepts only these bytes."""
    itemsize = np.dtype(dtype).itemsize
    rows, rest = chunk_rows(shape, itemsize), list(shape[1:])
    little = {"configuration": {"endian": "little"}, "name": "bytes"}
    crc32c = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [rows, *rest],
        "codecs": [{"name": "bytes"} if itemsize == 1 else little, crc32c],
        "index_codecs": [little, crc32c],
        "index_location": "end",
    }
    shard_rows = rows * max(1, chunk_count(shape, itemsize))
    document: dict[str, Any] = {
        "attributes": {},
        "chunk_grid": {"configuration": {"chunk_shape": [shard_rows, *rest]}, "name": "regular"},
        "chunk_key_encoding": {"configuration": {"separator": "/"}, "name": "default"},
        "codecs": [{"configuration": sharding, "name": "sharding_indexed"}],
        "data_type": dtype,
        "dimension_names": ["token", "dim"][: len(shape)],
        "fill_value": _FILLS.get(dtype, "NaN"),
        "node_type": "array",
        "shape": list(shape),
        "storage_transformers": [],
        "zarr_format": 3,
    }
    return json.dumps(document, separators=(",", ":")).encode("ascii")  # canonical: the keys above are in order


def encode_shard(values: np.ndarray) -> list[Buffer]:
    """The shard file of an array with at least one row, as buffers to be written one after the other."""
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    rows, step = len(values), chunk_rows(values.shape, values.itemsize)
    fill = _FILLS.get(values.dtype.name, np.nan)
    buffers: list[Buffer] = []
    index = []
    position = 0
    for start in range(0, rows, step):
        chunk = values[start : start + step]
        if len(chunk) < step:  # a shard holds whole chunks; the rest is filled with a value that a reader notices
            chunk = np.concatenate([chunk, np.full((step - len(chunk), *values.shape[1:]), fill, dtype=values.dtype)])
        data = chunk.data.cast("B")
        buffers += [data, _checksum(data)]
        index.append((position, len(data) + _CRC))
        position += len(data) + _CRC
    return [*buffers, *_index(index)]


def decode_shard(source: Source, shape: tuple[int, ...], dtype: str, into: np.ndarray | None = None) -> np.ndarray:
    """Read the array of a shard of known shape. Raises ArrayDamageError.

    ``into`` takes the values: an array of this shape and dtype, of any strides, such as a field of records; a new one
    by default. The caller has checked that the file has ``shard_bytes``.
    """
    values = np.empty(shape, dtype=np.dtype(dtype).newbyteorder("<")) if into is None else into
    if not shape[0]:
        return values
    step, count = chunk_rows(shape, values.itemsize), chunk_count(shape, values.itemsize)
    read = _read_chunks if values.flags.c_contiguous else _read_blocks
    size = read(source, values, step, count) + _CRC
    expected = b"".join(_index([(number * size, size) for number in range(count)]))
    index = bytearray(len(expected))
    source.readinto(memoryview(index))
    if index != expected:
        raise ArrayDamageError("the index of its chunks is not that of an array of this shape")
    return values


def _read_chunks(source: Source, values: np.ndarray, step: int, count: int) -> int:
    """Read ``count`` chunks of ``step`` rows straight into contiguous ``values``; returns the bytes of a chunk."""
    crc, size = bytearray(_CRC), 0
    for number in range(count):
        chunk = values[number * step : (number + 1) * step]
        padded = chunk if len(chunk) == step else np.empty((step, *values.shape[1:]), dtype=values.dtype)
        view = padded.data.cast("B")
        source.readinto(view)
        source.readinto(memoryview(crc))
        _check(view, crc, number * step, len(chunk))
        if padded is not chunk:
            chunk[...] = padded[: len(chunk)]
        size = len(view)
    return size


def _read_blocks(source: Source, values: np.ndarray, step: int, count: int) -> int:
    """Read ``count`` chunks of ``step`` rows into ``values`` of any strides; returns the bytes of a chunk.

    Several chunks are read, hashed and copied at once: each of these calls hands the interpreter lock over.
    """
    size = step * values.itemsize * int(np.prod(values.shape[1:], dtype=np.int64))
    block = np.empty((min(count, _CHUNKS_TOGETHER), size + _CRC), np.uint8)
    for first in range(0, count, _CHUNKS_TOGETHER):
        chunks, rows = block[: count - first], values[first * step : (first + _CHUNKS_TOGETHER) * step]
        source.readinto(chunks.data.cast("B"))
        for number, chunk in enumerate(chunks):
            start = (first + number) * step
            _check(chunk[:-_CRC].data, chunk[-_CRC:].tobytes(), start, min(step, len(values) - start))
        data = chunks[:, :-_CRC].view(values.dtype).reshape(len(chunks), step, *values.shape[1:])
        whole = len(rows) // step
        rows[: whole * step].reshape(whole, step, *values.shape[1:])[...] = data[:whole]
        if whole < len(chunks):
            rows[whole * step :] = data[whole, : len(rows) - whole * step]
    return size


def _check(data: Buffer, crc: Buffer, start: int, rows: int) -> None:
    if _checksum(data) != crc:
        raise ArrayDamageError(f"rows {start} to {start + rows - 1} do not match their crc32c")


def _index(entries: Iterable[tuple[int, int]]) -> list[bytes]:
    data = b"".join(struct.pack("<QQ", offset, size) for offset, size in entries)
    return [data, _checksum(data)]


def _checksum(data: Buffer) -> bytes:
    view = np.frombuffer(data, dtype=np.uint8)
    view.flags.writeable = False  # google_crc32c accepts read-only buffers only
    return struct.pack("<I", google_crc32c.value(view))
