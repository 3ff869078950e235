"""The Arrow files of a cache: schemas, encoding, and a decoder that accepts exactly what the manifest implies.

A file is one uncompressed record batch. pyarrow writes it. ``arrow_file`` reads it, because a forged file can crash
Arrow's own reader. Decoding copies nothing: arrays are read-only views of the bytes that were read and hashed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kdcache.cache.arrow_file import Column, Field, TableDamageError, read_columns
from kdcache.cache.ids import ID_BYTES
from kdcache.cache.tokens import Outputs, Tokens

__all__ = ["TableDamageError"]

BLOCK = 1 << 18  # rows that are read together out of a mapped file

_IDS = (Field("text_id", "fixed_size_binary", size=ID_BYTES),)
_EXAMPLES = (*_IDS, Field("label", "int64", nullable=True), Field("group", "string", nullable=True))
_TOKEN = (Field("start", "int32"), Field("end", "int32"), Field("segment", "int8"), Field("role", "int8"))
_TOKENS = (Field("tokens", "list", children=(Field("item", "struct", children=_TOKEN),)),)


def _text(columns: Sequence[str]) -> tuple[Field, ...]:
    return tuple(Field(column, "large_string") for column in columns)


def _outputs(classes: int, pooled: int | None) -> tuple[Field, ...]:
    widths = {"logits": classes} | ({} if pooled is None else {"pooled": pooled})
    return tuple(
        Field(name, "fixed_size_list", size=width, children=(Field("item", "float"),)) for name, width in widths.items()
    )


def ids_schema() -> Any:
    """Text ids."""
    return _schema(_IDS)


def outputs_schema(classes: int, pooled: int | None) -> Any:
    """Raw logits and, if ``pooled`` is a width, the pooled vector."""
    return _schema(_outputs(classes, pooled))


def encode_ids(ids: np.ndarray) -> bytes:
    """``uint8[n, 16]``."""
    return _encode(ids_schema(), [_id_column(ids)])


def encode_text(columns: Sequence[str], texts: Sequence[tuple[str, ...]]) -> bytes:
    """One row per text, one string column per text column, under its own name."""
    import pyarrow as pa

    arrays = [pa.array([text[i] for text in texts], type=pa.large_string()) for i in range(len(columns))]
    return _encode(_schema(_text(columns)), arrays)


def encode_examples(text_ids: np.ndarray, labels: np.ndarray, groups: Sequence[str] | None) -> bytes:
    """One row per example; many may share a text. Labels below zero become null."""
    import pyarrow as pa

    label = pa.array(labels, type=pa.int64(), mask=labels < 0)
    group = pa.array(groups, type=pa.string()) if groups is not None else pa.nulls(len(labels), pa.string())
    return _encode(_schema(_EXAMPLES), [_id_column(text_ids), label, group])


def encode_outputs(outputs: Outputs) -> bytes:
    """Logits ``float32[n, classes]`` and pooled ``float32[n, width]``."""
    import pyarrow as pa

    pooled = outputs.pooled
    schema = outputs_schema(outputs.logits.shape[1], None if pooled is None else pooled.shape[1])
    arrays = [
        pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(values, np.float32).reshape(-1), type=field.type)
        for values, field in zip((outputs.logits, pooled), schema, strict=False)
    ]
    return _encode(schema, arrays)


def encode_tokens(tokens: Tokens) -> bytes:
    """One list per text, with (start, end, segment, role) of each token."""
    import pyarrow as pa

    schema = _schema(_TOKENS)
    kind = schema.field(0).type
    fields = list(kind.value_type)
    columns = (tokens.starts, tokens.ends, tokens.segments, tokens.roles)
    values = [
        pa.array(np.ascontiguousarray(column), type=field.type) for column, field in zip(columns, fields, strict=True)
    ]
    structs = pa.StructArray.from_arrays(values, fields=fields)
    offsets = pa.array(tokens.offsets.astype(np.int32), type=pa.int32())
    return _encode(schema, [pa.ListArray.from_arrays(offsets, structs, type=kind)])


def decode_ids(data: bytes, rows: int) -> np.ndarray:
    """``uint8[rows, 16]``, read-only. This and the decoders below raise TableDamageError."""
    return read_columns(data, _IDS, rows)[0].values


def decode_text(data: bytes, columns: Sequence[str], rows: int) -> list[tuple[str, ...]]:
    """The texts of a part."""
    return list(zip(*(column.strings() for column in read_columns(data, _text(columns), rows)), strict=True))


def decode_examples(data: bytes, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]:
    """Ids, labels (-1: no label; else below ``classes``), and groups (None if no example has one)."""
    ids, label, group = read_columns(data, _EXAMPLES, rows)
    labels = _labels(label, slice(None), classes)
    return ids.values, labels, None if group.null_count == rows else tuple(group.strings())


def _labels(column: Column, which: slice, classes: int) -> np.ndarray:
    values = column.values[which]
    labels = values if column.valid is None else np.where(column.valid[which], values, -1)
    if len(labels) and not -1 <= labels.min() <= labels.max() < classes:
        raise TableDamageError(f"has a label that is not one of the {classes} of the task")
    return labels


def id_blocks(data: mmap.mmap, rows: int) -> Iterator[np.ndarray]:
    """The ids of examples in a mapped file, uint8[m, 16] block by block; what was read takes no memory afterwards."""
    ids = read_columns(data, _EXAMPLES, rows)[0].values
    for start in range(0, rows, BLOCK):
        yield ids[start : start + BLOCK].copy()
        _forget(data)


def compact_labels(data: mmap.mmap, rows: int, classes: int) -> np.ndarray:
    """The labels of examples in a mapped file, in the smallest integers [rows], -1: no label."""
    column = read_columns(data, _EXAMPLES, rows)[1]
    labels = np.empty(rows, np.min_scalar_type(-max(classes, 2)))
    for start in range(0, rows, BLOCK):
        which = slice(start, start + BLOCK)
        labels[which] = _labels(column, which, classes)
        _forget(data)
    return labels


def _forget(data: mmap.mmap) -> None:
    """Take the pages of a mapped file out of this process; the system still has them."""
    if hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)


def decode_outputs(data: bytes, rows: int, classes: int, pooled: int | None) -> Outputs:
    """Outputs of a part; read-only views."""
    columns = read_columns(data, _outputs(classes, pooled), rows)
    return Outputs(columns[0].values, columns[1].values if pooled is not None else None)


def decode_tokens(data: bytes, rows: int, tokens: int) -> Tokens:
    """The ``tokens`` tokens of a part; read-only views."""
    (column,) = read_columns(data, _TOKENS, rows)
    (token,) = column.children
    if token.length != tokens or column.offsets[0]:
        raise TableDamageError(f"holds {token.length - int(column.offsets[0])} tokens, {tokens} expected")
    return Tokens(column.offsets.astype(np.int64), *(value.values for value in token.children))


def _encode(schema: Any, arrays: list[Any]) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=None, use_threads=False)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return bytes(sink.getvalue())


def _schema(fields: Sequence[Field]) -> Any:
    import pyarrow as pa

    return pa.schema([_pyarrow_field(field) for field in fields])


def _pyarrow_field(field: Field) -> Any:
    import pyarrow as pa

    match field.kind:
        case "fixed_size_binary":
            kind = pa.binary(field.size)
        case "fixed_size_list":
            kind = pa.list_(_pyarrow_field(field.children[0]), field.size)
        case "list":
            kind = pa.list_(_pyarrow_field(field.children[0]))
        case "struct":
            kind = pa.struct([_pyarrow_field(child) for child in field.children])
        case "float":
            kind = pa.float32()
        case _:
            kind = getattr(pa, field.kind)()
    return pa.field(field.name, kind, nullable=field.nullable)


def _id_column(ids: np.ndarray) -> Any:
    import pyarrow as pa

    data = np.ascontiguousarray(ids, dtype=np.uint8)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(ID_BYTES), len(data), [None, pa.py_buffer(data)])
