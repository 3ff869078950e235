"""Forged Arrow files.

Whatever their metadata say, they are read as they were or refused; and plain Arrow reads what is read here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kdcache.cache import tables
from kdcache.cache.arrow_file import TableDamageError
from kdcache.cache.tokens import Outputs, Tokens

IDS = np.arange(80, dtype=np.uint8).reshape(5, 16)
LABELS = np.array([0, -1, 2, -1, 1])
TEXTS = [("x", "yé"), ("", "z"), ("日本", "")]
OFFSETS = np.array([0, 2, 2, 5])
TOKENS = Tokens(OFFSETS, *(np.arange(5).astype(dtype) for dtype in (np.int32, np.int32, np.int8, np.int8)))
OUTPUTS = Outputs(np.arange(12, dtype=np.float32).reshape(4, 3), np.ones((4, 2), np.float32))

Decode = Callable[[bytes], Any]
FILES: dict[str, tuple[bytes, Decode]] = {
    "ids": (tables.encode_ids(IDS), lambda data: tables.decode_ids(data, 5)),
    "text": (tables.encode_text(["a", "b"], TEXTS), lambda data: tables.decode_text(data, ["a", "b"], 3)),
    "examples": (
        tables.encode_examples(IDS, LABELS, ("a", "b", "", "d", "e")),
        lambda data: tables.decode_examples(data, 5, 3),
    ),
    "outputs": (tables.encode_outputs(OUTPUTS), lambda data: vars(tables.decode_outputs(data, 4, 3, 2))),
    "tokens": (tables.encode_tokens(TOKENS), lambda data: vars(tables.decode_tokens(data, 3, 5))),
}
WORDS = [
    0xFFFFFFFF,
    0x7FFFFFFF,
    0x80000000,
    0x40000000,
    0x7FFFFFF8,
    0x10000,
]  # lengths, distances and offsets that are none


def plain(value: Any) -> Any:
    """Arrays as lists, so that values can be compared."""
    if isinstance(value, dict | list | tuple):
        return [plain(item) for item in (value.values() if isinstance(value, dict) else value)]
    return value.tolist() if isinstance(value, np.ndarray) else value


def metadata(data: bytes) -> list[range]:
    """Where the metadata of both messages and the footer lie."""
    (schema,) = struct.unpack_from("<i", data, 12)
    (batch,) = struct.unpack_from("<i", data, 20 + schema)
    (footer,) = struct.unpack_from("<i", data, len(data) - 10)
    return [range(8, 24 + schema + batch), range(len(data) - 10 - footer, len(data) - 6)]


@pytest.mark.parametrize("kind", FILES)
def test_metadata_that_say_anything_change_nothing_or_are_refused(kind: str) -> None:
    data, decode = FILES[kind]
    wanted, taken = plain(decode(data)), 0
    for places in metadata(data):
        for at in places[: -3 or None]:
            if at % 2 == 0:  # all values but single bytes lie at even places
                for word in WORDS:
                    forged = data[:at] + struct.pack("<I", word) + data[at + 4 :]
                    try:
                        found = plain(decode(forged))
                    except TableDamageError:
                        continue
                    taken += 1
                    assert found == wanted, f"{word:x} at {at}"
    assert taken  # padding, and the sizes of tables, which nobody needs


@pytest.mark.parametrize("kind", FILES)
def test_each_byte_of_the_metadata_may_be_any_other(kind: str) -> None:
    data, decode = FILES[kind]
    for places in metadata(data):
        for at in places:
            for value in (0, 1, 4, 8, 9, 0x7F, 0x80, 0xFF):
                forged = data[:at] + bytes([value]) + data[at + 1 :]
                try:
                    decode(forged)
                except TableDamageError as error:
                    assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_cut_anywhere_is_refused(kind: str) -> None:
    data, decode = FILES[kind]
    for end in range(len(data)):
        for forged in (data[:end], data[:end] + b"ARROW1"):
            if forged != data:
                with pytest.raises(TableDamageError):
                    decode(forged)


def test_buffers_of_nodes_without_nulls_may_have_a_bitmap_and_padding() -> None:
    """As other writers of Arrow files may have it."""
    values = pa.Array.from_buffers(
        pa.binary(16), 5, [pa.py_buffer(b"\x1f" + bytes(63)), pa.py_buffer(IDS.tobytes() + bytes(48))]
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, tables.ids_schema()) as writer:
        writer.write_batch(pa.record_batch([values], schema=tables.ids_schema()))
    assert tables.decode_ids(sink.getvalue().to_pybytes(), 5).tolist() == IDS.tolist()


def test_what_is_read_is_what_arrow_reads_and_a_view() -> None:
    data, decode = FILES["outputs"]
    table = pa.ipc.open_file(data).read_all()
    found = decode(data)
    assert (
        plain(found["logits"]) == table["logits"].to_pylist() and plain(found["pooled"]) == table["pooled"].to_pylist()
    )
    assert not found["logits"].flags.writeable
    assert np.shares_memory(found["logits"], np.frombuffer(data, np.uint8))
    tokens = pa.ipc.open_file(FILES["tokens"][0]).read_all()["tokens"].to_pylist()
    assert [[one["start"] for one in text] for text in tokens] == [[0, 1], [], [2, 3, 4]]
