"""The Arrow files of a cache: schemas, encoding, and a decoder that takes exactly what the manifest implies.

A file is one uncompressed record batch. Its schema and row count are compared with the expected ones before a column is
touched, and compression is refused, because a compressed buffer states its own decompressed size. Decoding copies nothing:
the arrays are read-only views of the bytes that were read and digested.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcache.cache.blocks import Outputs
from kdcache.cache.ids import ID_BYTES
from kdcache.cache.tokens import Tokens

_SHOWN = 400  # characters of a schema in a message
_MAGIC = b"ARROW1\0\0"


class TableDamageError(ValueError):
    """The bytes are not the Arrow file that was expected."""


def ids_schema() -> Any:
    """Text ids."""
    import pyarrow as pa

    return pa.schema([pa.field("text_id", pa.binary(ID_BYTES), nullable=False)])


def text_schema(columns: Sequence[str]) -> Any:
    """The text columns under their own names."""
    import pyarrow as pa

    return pa.schema([pa.field(column, pa.large_string(), nullable=False) for column in columns])


def examples_schema() -> Any:
    """Examples: many may share a text; label and group may be null."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("text_id", pa.binary(ID_BYTES), nullable=False),
            pa.field("label", pa.int64()),
            pa.field("group", pa.string()),
        ]
    )


def outputs_schema(classes: int, pooled: int | None) -> Any:
    """Raw logits and, where stored, the pooled vector."""
    import pyarrow as pa

    fields = [pa.field("logits", _vector(classes), nullable=False)]
    if pooled is not None:
        fields.append(pa.field("pooled", _vector(pooled), nullable=False))
    return pa.schema(fields)


def tokens_schema() -> Any:
    """One list per text, one entry per token."""
    import pyarrow as pa

    token = pa.struct(
        [
            pa.field("start", pa.int32(), nullable=False),
            pa.field("end", pa.int32(), nullable=False),
            pa.field("segment", pa.int8(), nullable=False),
            pa.field("role", pa.int8(), nullable=False),
        ]
    )
    return pa.schema([pa.field("tokens", pa.list_(pa.field("item", token, nullable=False)), nullable=False)])


def encode_ids(ids: np.ndarray) -> bytes:
    """``uint8[n, 16]``."""
    return _encode(ids_schema(), [_id_column(ids)])


def encode_text(columns: Sequence[str], texts: Sequence[tuple[str, ...]]) -> bytes:
    """One row per text, one string column per text column."""
    import pyarrow as pa

    arrays = [pa.array([text[i] for text in texts], type=pa.large_string()) for i in range(len(columns))]
    return _encode(text_schema(columns), arrays)


def encode_examples(text_ids: np.ndarray, labels: np.ndarray, groups: Sequence[str] | None) -> bytes:
    """Labels below zero become null."""
    import pyarrow as pa

    label = pa.array(labels, type=pa.int64(), mask=labels < 0)
    group = pa.array(groups, type=pa.string()) if groups is not None else pa.nulls(len(labels), pa.string())
    return _encode(examples_schema(), [_id_column(text_ids), label, group])


def encode_outputs(outputs: Outputs) -> bytes:
    """Logits ``float32[n, classes]`` and pooled ``float32[n, width]``."""
    pooled = outputs.pooled
    arrays = [_vectors(outputs.logits)] + ([] if pooled is None else [_vectors(pooled)])
    return _encode(outputs_schema(outputs.logits.shape[1], None if pooled is None else pooled.shape[1]), arrays)


def encode_tokens(tokens: Tokens) -> bytes:
    """Tokens as lists of (start, end, segment, role)."""
    import pyarrow as pa

    schema = tokens_schema()
    kind = schema.field(0).type
    columns = [np.ascontiguousarray(column) for column in (tokens.starts, tokens.ends, tokens.segments, tokens.roles)]
    struct_fields = list(kind.value_type)
    structs = pa.StructArray.from_arrays(
        [pa.array(column, type=one.type) for column, one in zip(columns, struct_fields, strict=True)], fields=struct_fields
    )
    offsets = pa.array(tokens.offsets.astype(np.int32), type=pa.int32())
    return _encode(schema, [pa.ListArray.from_arrays(offsets, structs, type=kind)])


def decode_ids(data: bytes, rows: int) -> np.ndarray:
    """``uint8[rows, 16]``, read-only. This and the decoders below raise TableDamageError."""
    return _id_values(_decode(data, ids_schema(), rows).column(0))


def decode_text(data: bytes, columns: Sequence[str], rows: int) -> list[tuple[str, ...]]:
    """The texts of a part."""
    batch = _decode(data, text_schema(columns), rows)
    return list(zip(*(batch.column(i).to_pylist() for i in range(len(columns))), strict=True))


def decode_examples(data: bytes, rows: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]:
    """Ids, labels (-1 for none), groups (None where no example has one)."""
    batch = _decode(data, examples_schema(), rows)
    labels = _labels(batch.column(1))
    group = batch.column(2)
    groups = None if group.null_count == rows else tuple(name or "" for name in group.to_pylist())
    return _id_values(batch.column(0)), labels, groups


def decode_outputs(data: bytes, rows: int, classes: int, pooled: int | None) -> Outputs:
    """Outputs of a part; read-only views."""
    batch = _decode(data, outputs_schema(classes, pooled), rows)
    widths = [classes] if pooled is None else [classes, pooled]
    columns = [batch.column(i).values.to_numpy(zero_copy_only=True).reshape(rows, width) for i, width in enumerate(widths)]
    return Outputs(columns[0], columns[1] if pooled is not None else None)


def decode_tokens(data: bytes, rows: int, tokens: int) -> Tokens:
    """Tokens of a part, ``tokens`` of them; read-only views."""
    column = _decode(data, tokens_schema(), rows).column(0)
    offsets = column.offsets.to_numpy(zero_copy_only=True).astype(np.int64) if rows else np.zeros(1, dtype=np.int64)
    structs = column.values
    if structs.null_count or len(structs) != tokens or offsets[0] != 0 or offsets[-1] != tokens:
        raise TableDamageError(f"holds {len(structs)} tokens, {tokens} expected")
    values = [structs.field(i) for i in range(4)]
    if any(value.null_count for value in values):
        raise TableDamageError("a token has a null")
    return Tokens(offsets, *(value.to_numpy(zero_copy_only=True) for value in values))


def _encode(schema: Any, arrays: list[Any]) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=None, use_threads=False)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return bytes(sink.getvalue())


def _decode(data: bytes, schema: Any, rows: int) -> Any:
    import pyarrow as pa

    if data[:8] != _MAGIC or data[-6:] != _MAGIC[:6]:
        raise TableDamageError("is not an Arrow file")
    try:
        messages = pa.ipc.MessageReader.open_stream(pa.py_buffer(data).slice(8))
        found = pa.ipc.read_schema(messages.read_next_message())
        if not found.equals(schema, check_metadata=True):
            raise TableDamageError(f"has the schema {_one_line(found)}, expected {_one_line(schema)}")
        message = messages.read_next_message()
        _check_header(message, rows)
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        _check_rows(batch, schema, rows)
        if next(iter(messages), None) is not None:
            raise TableDamageError("has more than one record batch")
    except StopIteration as error:
        raise TableDamageError("has no record batch") from error
    except (pa.ArrowException, OSError) as error:
        raise TableDamageError(f"is not readable: {str(error).splitlines()[0]}") from error
    return batch


def _check_header(message: Any, rows: int) -> None:
    """Row count and compression of a record batch, from its flatbuffer: before Arrow allocates anything for it."""
    if message.type != "record batch":
        raise TableDamageError(f"has a {message.type} where its record batch should be")
    try:
        length, compressed = _batch_header(memoryview(message.metadata))
    except struct.error as error:
        raise TableDamageError("has a malformed record batch") from error
    if compressed:
        raise TableDamageError("is compressed; files of a cache are not")
    if length != rows:
        raise TableDamageError(f"has {length} rows, expected {rows}")


def _batch_header(data: memoryview) -> tuple[int, bool]:
    (message,) = struct.unpack_from("<I", data, 0)
    header = _field(data, message, 2)
    if header is None:
        return 0, False
    batch = header + struct.unpack_from("<I", data, header)[0]
    length = _field(data, batch, 0)
    return (struct.unpack_from("<q", data, length)[0] if length is not None else 0), _field(data, batch, 3) is not None


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Where field ``number`` of a flatbuffer table lies; None where it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0 or 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
        return None
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * number)
    return table + offset if offset else None


def _check_rows(batch: Any, schema: Any, rows: int) -> None:
    if batch.num_rows != rows:
        raise TableDamageError(f"has {batch.num_rows} rows, expected {rows}")
    for column, one in zip(batch.columns, schema, strict=True):
        if column.null_count and not one.nullable:
            raise TableDamageError(f"has nulls in column '{one.name}'")
        if hasattr(column, "values") and len(column.values) and column.values.null_count:
            raise TableDamageError(f"has nulls in column '{one.name}'")


def _vector(length: int) -> Any:
    import pyarrow as pa

    return pa.list_(pa.field("item", pa.float32(), nullable=False), length)


def _vectors(values: np.ndarray) -> Any:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=_vector(values.shape[1]))


def _labels(column: Any) -> np.ndarray:
    """int64, -1 where there is none. By the buffers: Arrow's own ``fill_null`` imports pandas, a third of a second of an opening."""
    validity, values = column.buffers()
    labels: np.ndarray = np.frombuffer(values, np.int64, len(column), 8 * column.offset) if len(column) else np.zeros(0, np.int64)
    if not column.null_count:
        return labels
    bits = np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")[column.offset : column.offset + len(column)]
    return np.where(bits, labels, -1)


def _id_column(ids: np.ndarray) -> Any:
    import pyarrow as pa

    data = np.ascontiguousarray(ids, dtype=np.uint8)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(ID_BYTES), len(data), [None, pa.py_buffer(data)])


def _id_values(column: Any) -> np.ndarray:
    data = column.buffers()[1]
    ids = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, dtype=np.uint8)
    return ids[: len(column) * ID_BYTES].reshape(-1, ID_BYTES)


def _one_line(schema: Any) -> str:
    shown = ", ".join(str(one).removeprefix("pyarrow.Field<").removesuffix(">") for one in itertools.islice(schema, 10))
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]} ..."
