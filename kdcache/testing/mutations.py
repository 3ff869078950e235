"""Damaged and forged files, each a function of a random generator: bytes, JSON documents, Arrow files, shards.

Random bytes are refused early and find few faults. So numbers are set to the limits of their ranges, pieces are copied
from elsewhere in the file or from another file of the same kind, and checksums in a file are computed again.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

EXTREMES = (0, 1, -1, 2, 3, 7, 8, 9, 16, 64, 127, -128, 255, 256, 32767, -32768,
            65535, 65536, 2**31 - 1, -(2**31), 2**32 - 1,
            2**32, 2**40, 2**53, 2**62, 2**63 - 1, -(2**63), 2**63 - 8, 2**63 - 64)  # fmt: skip
_WIDTHS = (1, 2, 4, 4, 8, 8)
_STRINGS = ("", "..", "../../etc/passwd", "/etc/passwd", "part-00000", "part-99999", "bert", "BERT",
            "\x00", "\x1b[2J", "\ud800",
            "é" * 300, "x" * 5000, "0", "-1", "no", "yes", "all", "f" * 64, "0" * 64,
            "float32", "coded", "pca", "mine@1")  # fmt: skip
_MOST = 1 << 16  # bytes of a mutated file


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Make one to four changes: bits, bytes, extreme numbers; ranges removed, repeated, moved or from ``others``."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        rng.choice(_CHANGES)(rng, changed, others)
    return bytes(changed[:_MOST])


def mutate_same_size(rng: random.Random, data: bytes) -> bytes:
    """Like ``mutate_bytes``, for files of fixed size: only values change."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice((_flip, _byte, _number))(rng, changed, ())
    return bytes(changed)


def _flip(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _byte(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.randrange(256)


def _number(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    """Change a little-endian number at an even position: to an extreme, another number of the file, or by 1."""
    width = rng.choice(_WIDTHS)
    if len(data) < width:
        return
    at = rng.randrange(len(data) - width + 1)
    at -= at % min(width, 4)
    own = int.from_bytes(data[at : at + width], "little")
    place = rng.randrange(len(data) - width + 1)
    other = int.from_bytes(data[place : place + width], "little")
    value = rng.choice((rng.choice(EXTREMES), own + rng.choice((-8, -4, -1, 1, 4, 8)), other))
    data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")


def _remove(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    start, size = _range(rng, data)
    del data[start : start + size]


def _repeat(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    start, size = _range(rng, data)
    data[start:start] = data[start : start + size] * rng.choice((1, 1, 2, 50))


def _move(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    start, size = _range(rng, data)
    at = rng.randrange(len(data) + 1)
    data[at : at + size] = data[start : start + size]


def _cut(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _grow(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    data += rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(rng.randrange(64)), bytes(data[-10:])))


def _splice(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    if others:
        other = rng.choice(others)
        at, start = rng.randrange(len(data) + 1), rng.randrange(len(other) + 1)
        data[at:] = other[start if rng.random() < 0.5 else at :]


def _range(rng: random.Random, data: bytearray) -> tuple[int, int]:
    size = rng.choice((1, 2, 4, 8, 16, 24, rng.randrange(len(data) + 1)))
    start = rng.randrange(len(data) + 1)
    return start - start % rng.choice((1, 4, 8)), size


Change = Callable[[random.Random, bytearray, Sequence[bytes]], None]
_CHANGES: tuple[Change, ...] = (_flip, _byte, _number, _number, _number, _remove, _repeat, _move, _cut, _grow, _splice)


def mutate_numbers(rng: random.Random, values: np.ndarray) -> np.ndarray:
    """A copy of integers in which one, some or all are replaced by extremes of their type or by small numbers."""
    changed = values.copy()
    limits = np.iinfo(values.dtype)
    fitting = [value for value in EXTREMES if limits.min <= value <= limits.max]
    count = rng.choice((0, 0, 1, 2, len(values) // 2, len(values)))
    for at in rng.sample(range(len(values)), min(count, len(values))):
        changed[at] = rng.choice(fitting) if rng.random() < 0.5 else rng.randrange(5)
    return changed


def mutate_json(rng: random.Random, document: Any) -> Any:
    """One to three changes of a document of objects, lists, strings and integers."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_json(rng, document)
    return document


def _change_json(rng: random.Random, document: Any) -> None:
    """Change something of an object or list inside of ``document``."""
    containers = list(_containers(document))
    place = rng.choice(containers)
    keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
    what = rng.randrange(7)
    if not keys or what == 0:
        _add(place, rng.choice(_STRINGS), _value(rng, containers))
        return
    key = rng.choice(keys)
    if what == 1:
        del place[key]
    elif what == 2:
        _add(place, rng.choice(_STRINGS), place.pop(key))
    elif what == 3 and isinstance(place[key], int):
        place[key] += rng.choice((-1, 1, 8, -8, 1 << 20))
    elif what == 4 and isinstance(place[key], str) and place[key]:
        at = rng.randrange(len(place[key]))
        place[key] = place[key][:at] + rng.choice(("", "/", "0", "g", "\n", "é")) + place[key][at + 1 :]
    else:
        place[key] = _value(rng, containers)


def _containers(value: Any) -> Any:
    """All objects and lists, so that each is equally likely."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


def _add(place: Any, key: str, value: Any) -> None:
    if isinstance(place, dict):
        place[key] = value
    else:
        place.append(value)


def _value(rng: random.Random, containers: Sequence[Any]) -> Any:
    """An extreme value, or a copy of another value of the document."""
    what = rng.randrange(6)
    if what == 0:
        return rng.choice(_STRINGS)
    if what == 1:
        return rng.choice((None, True, False, 0.5, 1e308, [], {}, [[]], [0] * 300, {"a": {"b": {}}}))
    if what == 2:
        place = rng.choice(containers)
        items = list(place.values() if isinstance(place, dict) else place)
        return copy.deepcopy(rng.choice(items)) if items else {}
    return rng.choice(EXTREMES)


def json_bytes(rng: random.Random, document: Any) -> bytes:
    """A document as text; sometimes the text itself is damaged."""
    data = json.dumps(document, ensure_ascii=True, indent=rng.choice((None, 1))).encode()
    return mutate_bytes(rng, data) if rng.random() < 0.1 else data


def mutate_arrow(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change an Arrow file, mostly its flatbuffers, or return another file that Arrow wrote."""
    what = rng.randrange(8)
    if what == 0:
        return mutate_bytes(rng, data, others)
    if what == 1:
        return _written_otherwise(rng, data)
    changed = bytearray(data)
    footer = len(data) - 10 - struct.unpack_from("<i", data, len(data) - 10)[0]
    schema = 16 + struct.unpack_from("<i", data, 12)[0]
    batch = schema + 8 + struct.unpack_from("<i", data, schema + 4)[0]
    for _ in range(rng.choice((1, 1, 2, 3))):
        start, end = rng.choice(((8, schema), (schema, batch), (schema, batch), (batch, footer), (footer, len(data))))
        piece = bytearray(changed[start:end])
        rng.choice((_number, _number, _number, _byte, _flip, _move))(rng, piece, ())
        changed[start:end] = piece[: end - start].ljust(end - start, b"\0")
    return bytes(changed)


def _written_otherwise(rng: random.Random, data: bytes) -> bytes:
    """The same rows written in other ways: compressed, several batches, metadata, nullable, renamed, cut, doubled."""
    import pyarrow as pa

    with pa.ipc.open_file(data) as reader:
        table = reader.read_all()
    schema = table.schema
    what = rng.randrange(6)
    if what == 0:
        schema = schema.with_metadata({"pandas": "x"})
    elif what == 1:
        field = schema.field(0)
        schema = schema.set(
            0, pa.field(rng.choice((field.name, "x")), field.type, rng.random() < 0.5, metadata={"a": "b"})
        )
    elif what == 2:
        table, schema = (
            table.append_column("more", table.column(0)),
            schema.append(pa.field("more", schema.field(0).type, False)),
        )
    elif what == 3:
        table = table.slice(rng.randrange(2), rng.randrange(1 + table.num_rows))
    elif what == 4:
        table = pa.concat_tables([table, table])
    options = pa.ipc.IpcWriteOptions(compression=rng.choice((None, None, "lz4", "zstd")))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for batch in table.to_batches(max_chunksize=rng.choice((None, 1))):
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
    written: bytes = sink.getvalue().to_pybytes()
    return mutate_same_size(rng, written) if rng.random() < 0.3 else written


def mutate_shard(rng: random.Random, data: bytes) -> bytes:
    """Change values of a shard of one chunk; its checksums may be computed again, so that later checks are reached."""
    import google_crc32c

    changed = bytearray(mutate_same_size(rng, data))
    for start, end in ((0, len(data) - 24), (len(data) - 20, len(data) - 4)):
        if rng.random() < 0.6:
            changed[end : end + 4] = struct.pack("<I", google_crc32c.value(bytes(changed[start:end])))
    return bytes(changed)


def mutate_safetensors(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change the header, as JSON with the right length, or the bytes."""
    (length,) = struct.unpack_from("<Q", data)
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, others)
    header = json_bytes(rng, mutate_json(rng, json.loads(data[8 : 8 + length])))
    body = data[8 + length :]
    return struct.pack("<Q", len(header)) + header + (mutate_bytes(rng, body) if rng.random() < 0.3 else body)
