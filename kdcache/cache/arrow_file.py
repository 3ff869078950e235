"""Reads the Arrow files of a cache without Arrow's reader.

A cache may come from somebody else. Arrow's own reader checks the structure of a file but not the values in it: a
forged file ends the process with a segmentation fault or an abort, which no ``except`` catches (docs/decisions/0018).

A file of a cache has one uncompressed record batch, and its schema is known before the file is opened. So a small part
of the format is enough: two messages, the footer, and the flatbuffer tables in them. This module compares every
position with the length of the data before it uses it, and never allocates the size that a file claims. Columns are
read-only views of the data; nothing is copied. Arrow gets verified buffers only: those of strings, which it decodes
faster than Python.

The layout: "ARROW1", 2 bytes, schema message, record batch message with its body, end of stream, footer, length of the
footer, "ARROW1". A message is ff ff ff ff, the length of its metadata, the metadata (a flatbuffer), the body.
"""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np

Kind = Literal[
    "int8",
    "int32",
    "int64",
    "float",
    "string",
    "large_string",
    "fixed_size_binary",
    "fixed_size_list",
    "list",
    "struct",
]

_MAGIC = b"ARROW1"
_CONTINUATION = b"\xff\xff\xff\xff"
_VERSIONS = (3, 4)  # V4 and V5 of the metadata: equal in the parts that are read here
_SCHEMA, _RECORD_BATCH = 1, 3  # kinds of a message
_ALIGNMENT = 8
_BLOCK = 24  # bytes of an entry of the footer: offset, length of the metadata, bytes of the body
_SHOWN = 80  # characters of a name in a message

_TYPES: dict[int, str] = {
    1: "null", 2: "int", 3: "float", 4: "binary", 5: "string", 6: "bool", 7: "decimal", 8: "date", 9: "time",
    10: "timestamp", 11: "interval", 12: "list", 13: "struct", 14: "union", 15: "fixed_size_binary",
    16: "fixed_size_list", 17: "map", 18: "duration", 19: "large_binary", 20: "large_string", 21: "large_list",
}  # fmt: skip
_SINGLE = 1  # precision of a floating point type

_U8, _I16, _U16, _I32, _U32, _I64 = (struct.Struct(f"<{code}") for code in "BhHiIq")
_PAIR = struct.Struct("<qq")
_BLOCK_FIELDS = struct.Struct("<qi4xq")
_DTYPES: dict[str, np.dtype[Any]] = {
    "int8": np.dtype("i1"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "float": np.dtype("<f4"),
}


Data = bytes | mmap.mmap


class TableDamageError(ValueError):
    """The bytes are not the Arrow file that was expected."""


@dataclass(frozen=True)
class Field:
    """A field of a schema. ``size``: bytes of a fixed_size_binary, values of a fixed_size_list."""

    name: str
    kind: Kind
    nullable: bool = False
    size: int = 0
    children: tuple[Field, ...] = ()

    def __str__(self) -> str:
        size = f"[{self.size}]" if self.size else ""
        children = f"<{', '.join(map(str, self.children))}>" if self.children else ""
        return f"{self.name}: {self.kind}{children}{size}{'' if self.nullable else ' not null'}"


@dataclass(frozen=True, eq=False)
class Column:
    """A verified column; arrays are read-only views of the file."""

    name: str
    length: int
    valid: np.ndarray | None  # bool[length]; None if there are no nulls
    # [length]; fixed_size_list: [length, size]; fixed_size_binary: uint8 [length, size]; strings: uint8 [bytes]
    values: np.ndarray
    offsets: np.ndarray  # of strings and lists: int32 or int64 [length + 1], never decreasing, within the values
    children: tuple[Column, ...]

    @property
    def null_count(self) -> int:
        """How many rows are null."""
        return 0 if self.valid is None else self.length - int(np.count_nonzero(self.valid))

    def strings(self) -> list[str]:
        """The texts of a string column; a null becomes an empty text. Raises TableDamageError if one is not UTF-8."""
        if not self.length:
            return []
        import pyarrow as pa

        kind = pa.StringArray if self.offsets.itemsize == 4 else pa.LargeStringArray
        try:
            texts: list[str] = kind.from_buffers(
                self.length, pa.py_buffer(self.offsets), pa.py_buffer(self.values)
            ).to_pylist()
        except UnicodeDecodeError as error:
            raise TableDamageError(f"has a text in column '{self.name}' that is not UTF-8") from error
        if self.valid is None:
            return texts
        return [text if valid else "" for text, valid in zip(texts, self.valid.tolist(), strict=True)]


def read_columns(data: Data, fields: tuple[Field, ...], rows: int) -> list[Column]:
    """The columns of a file with exactly these fields and so many rows. Raises TableDamageError."""
    if data[:8] != _MAGIC + b"\0\0" or data[-6:] != _MAGIC:
        raise TableDamageError("is not an Arrow file")
    try:
        return _read(data, fields, rows)
    except struct.error as error:
        raise TableDamageError("is not readable: its metadata refer to positions beyond its end") from error


def _read(data: Data, fields: tuple[Field, ...], rows: int) -> list[Column]:
    schema, schema_end = _metadata(data, 8)
    _check_schema_message(schema, fields)
    if data[schema_end : schema_end + 8] == _CONTINUATION + bytes(4):
        raise TableDamageError("has no record batch")
    metadata, body = _metadata(data, schema_end)
    batch, body_bytes = _message(metadata, _RECORD_BATCH, len(data) - body)
    end = body + body_bytes
    _check_footer(data, end, (schema_end, body - schema_end, body_bytes), fields)
    return _Batch(data, metadata, batch, body, body_bytes).columns(fields, rows)


def _metadata(data: Data, at: int) -> tuple[bytes, int]:
    """The metadata of the message at position ``at``, and the position of its body."""
    if data[at : at + 4] != _CONTINUATION:
        raise TableDamageError("is not readable: there is no message at the expected position")
    (length,) = _I32.unpack_from(data, at + 4)
    start = at + 8
    if length <= 0 or length > len(data) - start or length % _ALIGNMENT:
        raise TableDamageError(f"is not readable: a message has metadata of {length} bytes")
    return data[start : start + length], start + length


def _message(metadata: bytes, kind: int, room: int) -> tuple[int, int]:
    """The position of the header table of a message, and the size of its body: at most ``room`` bytes."""
    message = _follow(metadata, 0)
    given = _number(metadata, message, 1, _U8)
    header = _child(metadata, message, 2)
    if _number(metadata, message, 0, _I16) not in _VERSIONS or given != kind or header is None:
        wanted = "schema" if kind == _SCHEMA else "record batch"
        raise TableDamageError(f"has a message of kind {given} instead of its {wanted}")
    body = _number(metadata, message, 3, _I64)
    if not 0 <= body <= room or body % _ALIGNMENT:
        raise TableDamageError(f"is not readable: a message has a body of {body} bytes")
    return header, body


@functools.lru_cache(maxsize=64)  # all parts of a cache have the same schema
def _check_schema_message(metadata: bytes, fields: tuple[Field, ...]) -> None:
    header, _ = _message(metadata, _SCHEMA, 0)
    _check_schema(metadata, header, fields)


def _check_footer(data: Data, after: int, block: tuple[int, int, int], fields: tuple[Field, ...]) -> None:
    """Check the end of the stream and the footer, where other readers of Arrow files begin."""
    if data[after : after + 8] != _CONTINUATION + bytes(4):
        raise TableDamageError("has more than one record batch, or no end of its stream")
    (length,) = _I32.unpack_from(data, len(data) - 10)
    start = len(data) - 10 - length
    if length <= 0 or start < after + 8:
        raise TableDamageError(f"is not readable: its footer has {length} bytes")
    footer = data[start : start + length]
    root = _follow(footer, 0)
    dictionaries, _ = _vector(footer, root, 2, _BLOCK)
    batches, first = _vector(footer, root, 3, _BLOCK)
    schema = _child(footer, root, 1)
    if dictionaries or batches != 1 or schema is None:
        raise TableDamageError(
            f"has a footer of {batches} record batches and {dictionaries} dictionaries, expected 1 and 0"
        )
    if _BLOCK_FIELDS.unpack_from(footer, first) != block:
        raise TableDamageError("has a footer with another position of its record batch")
    _check_schema(footer, schema, fields)


def _check_schema(data: bytes, schema: int, fields: tuple[Field, ...]) -> None:
    count, first = _vector(data, schema, 1, 4)
    if _number(data, schema, 0, _I16):
        raise TableDamageError("has the byte order of another machine")
    if _vector(data, schema, 2, 4)[0]:
        raise TableDamageError("has a schema with metadata")
    if count != len(fields):
        raise TableDamageError(f"has the schema of {count} columns, expected {_listed(fields)}")
    for number, field in enumerate(fields):
        _check_field(data, _follow(data, first + 4 * number), field)


def _check_field(data: bytes, table: int, field: Field) -> None:
    kind = _number(data, table, 2, _U8)
    kind_table = _child(data, table, 3)
    children, first = _vector(data, table, 5, 4)
    nullable = _number(data, table, 1, _U8)
    if _text(data, table, 0) != field.name.encode() or nullable != field.nullable or kind_table is None:
        _refuse_field(data, table, kind, field)
    if children != len(field.children) or (kind, _parameters(data, kind_table, kind)) != _wanted(field):
        _refuse_field(data, table, kind, field)
    if _slot(data, table, 4) is not None:
        raise TableDamageError(f"has a dictionary in column '{field.name}'")
    if _vector(data, table, 6, 4)[0]:
        raise TableDamageError(f"has a schema with metadata in column '{field.name}'")
    for number, child in enumerate(field.children):
        _check_field(data, _follow(data, first + 4 * number), child)


def _refuse_field(data: bytes, table: int, kind: int, field: Field) -> NoReturn:
    """Raise TableDamageError with the field in the file and the expected one."""
    name = (_text(data, table, 0) or b"")[:_SHOWN].decode("utf-8", "replace")
    nullable = "" if _number(data, table, 1, _U8) else " not null"
    raise TableDamageError(f"has the schema {name!r}: {_TYPES.get(kind, f'type {kind}')}{nullable}, expected {field}")


def _parameters(data: bytes, table: int, kind: int) -> tuple[int, ...]:
    name = _TYPES.get(kind)
    if name == "int":
        return _number(data, table, 0, _I32), _number(data, table, 1, _U8)
    if name == "float":
        return (_number(data, table, 0, _I16),)
    return (_number(data, table, 0, _I32),) if name in ("fixed_size_binary", "fixed_size_list") else ()


_TYPE_NUMBERS = {name: number for number, name in _TYPES.items()}


@functools.cache
def _wanted(field: Field) -> tuple[int, tuple[int, ...]]:
    """The type of a field and its parameters, as numbers in the file."""
    if field.kind in ("int8", "int32", "int64"):
        return _TYPE_NUMBERS["int"], (int(field.kind[3:]), 1)
    if field.kind == "float":
        return _TYPE_NUMBERS["float"], (_SINGLE,)
    return _TYPE_NUMBERS[field.kind], (field.size,) if field.size else ()


class _Batch:
    """The nodes (length and nulls) and buffers of a record batch; they are read in the order of the fields."""

    def __init__(self, data: Data, metadata: bytes, table: int, body: int, body_bytes: int) -> None:
        self._data, self._body, self._body_bytes = data, body, body_bytes
        self._rows = _number(metadata, table, 0, _I64)
        if _slot(metadata, table, 3) is not None:
            raise TableDamageError("is compressed; files of a cache are not")
        self._nodes = _pairs(metadata, table, 1)
        self._buffers = _pairs(metadata, table, 2)

    def columns(self, fields: Sequence[Field], rows: int) -> list[Column]:
        if self._rows != rows:
            raise TableDamageError(f"has {self._rows} rows, expected {rows}")
        columns = [self._column(field, rows) for field in fields]
        if next(self._nodes, None) is not None or next(self._buffers, None) is not None:
            raise TableDamageError("has more buffers than its schema needs")
        return columns

    def _column(self, field: Field, length: int) -> Column:
        count, nulls = self._next(self._nodes)
        if count != length:
            raise TableDamageError(f"has {count} values in column '{field.name}', expected {length}")
        valid = self._validity(field, length, nulls)
        values: np.ndarray = _NOTHING
        offsets: np.ndarray = _NOTHING
        children = [length] * len(field.children)
        match field.kind:
            case "string" | "large_string":
                offsets = self._offsets(field, length, _DTYPES["int32" if field.kind == "string" else "int64"])
                values = self._bytes(field, int(offsets[-1]))
            case "list":
                offsets = self._offsets(field, length, _DTYPES["int32"])
                children = [int(offsets[-1])]
            case "fixed_size_list":
                children = [length * field.size]
            case "fixed_size_binary":
                values = self._bytes(field, length * field.size).reshape(length, field.size)
            case "int8" | "int32" | "int64" | "float":
                dtype = _DTYPES[field.kind]
                values = self._bytes(field, length * dtype.itemsize).view(dtype)
        below = tuple(self._column(child, size) for child, size in zip(field.children, children, strict=True))
        if field.kind == "fixed_size_list":
            values = below[0].values.reshape(length, field.size)
        return Column(field.name, length, valid, values, offsets, below)

    def _validity(self, field: Field, length: int, nulls: int) -> np.ndarray | None:
        start, size = self._next_buffer(field)
        if nulls and not field.nullable:
            raise TableDamageError(f"has nulls in column '{field.name}'")
        if not size and not nulls:
            return None
        packed = self._view(field, start, size, -(-length // 8))
        valid = np.unpackbits(packed, count=length, bitorder="little").view(bool)
        if length - int(np.count_nonzero(valid)) != nulls:
            raise TableDamageError(f"has another number of nulls in column '{field.name}' than it says")
        return valid if nulls else None

    def _offsets(self, field: Field, length: int, dtype: np.dtype[Any]) -> np.ndarray:
        start, size = self._next_buffer(field)
        if not length and not size:  # a column without rows may have no offsets
            return np.zeros(1, dtype)
        offsets = self._view(field, start, size, (length + 1) * dtype.itemsize).view(dtype)
        if offsets[0] < 0 or (offsets[1:] < offsets[:-1]).any():
            raise TableDamageError(f"has decreasing offsets in column '{field.name}'")
        return offsets

    def _bytes(self, field: Field, needed: int) -> np.ndarray:
        return self._view(field, *self._next_buffer(field), needed)

    def _view(self, field: Field, start: int, size: int, needed: int) -> np.ndarray:
        """The first ``needed`` bytes of a buffer of ``size`` bytes, which lies within the body."""
        if needed > size:
            raise TableDamageError(f"has {size} bytes in a buffer of column '{field.name}' that needs {needed}")
        return np.frombuffer(self._data, np.uint8, needed, self._body + start) if needed else _NOTHING

    def _next_buffer(self, field: Field) -> tuple[int, int]:
        start, size = self._next(self._buffers)
        if not (0 <= start <= self._body_bytes and 0 <= size <= self._body_bytes - start) or start % _ALIGNMENT:
            raise TableDamageError(f"has a buffer of column '{field.name}' outside of its record batch")
        return start, size

    @staticmethod
    def _next(pairs: Iterator[tuple[int, int]]) -> tuple[int, int]:
        pair = next(pairs, None)
        if pair is None:
            raise TableDamageError("has fewer buffers than its schema needs")
        return pair


_NOTHING = np.zeros(0, np.uint8)
_NOTHING.flags.writeable = False


def _listed(fields: Sequence[Field]) -> str:
    shown = ", ".join(map(str, fields))
    return shown if len(shown) <= 5 * _SHOWN else f"{shown[: 5 * _SHOWN]} ..."


# Flatbuffers. A table begins with the distance back to its vtable. A vtable has 2 bytes for its own size, 2 bytes for
# the size of the table, and for each field 2 bytes with its offset in the table, or 0 if it is absent. Other references
# are distances forward. ``unpack_from`` refuses positions beyond the end, but not those before the beginning.


def _follow(data: bytes, at: int) -> int:
    """The position that the distance at position ``at`` refers to."""
    return at + int(_U32.unpack_from(data, at)[0])


def _slot(data: bytes, table: int, number: int) -> int | None:
    """The position of field ``number`` of a table; None if it is absent."""
    vtable = table - _I32.unpack_from(data, table)[0]
    if vtable < 0:
        raise struct.error
    if 4 + 2 * number >= _U16.unpack_from(data, vtable)[0]:
        return None
    offset = _U16.unpack_from(data, vtable + 4 + 2 * number)[0]
    return table + offset if offset else None


def _number(data: bytes, table: int, number: int, kind: struct.Struct) -> int:
    at = _slot(data, table, number)
    return 0 if at is None else int(kind.unpack_from(data, at)[0])


def _child(data: bytes, table: int, number: int) -> int | None:
    at = _slot(data, table, number)
    return None if at is None else _follow(data, at)


def _vector(data: bytes, table: int, number: int, size: int) -> tuple[int, int]:
    """The number of entries (of ``size`` bytes) of a vector, and the position of the first; 0 and 0 if absent."""
    at = _child(data, table, number)
    if at is None:
        return 0, 0
    count = int(_U32.unpack_from(data, at)[0])
    if count * size > len(data) - at - 4:
        raise struct.error
    return count, at + 4


def _text(data: bytes, table: int, number: int) -> bytes | None:
    count, first = _vector(data, table, number, 1)
    return data[first : first + count] if first else None


def _pairs(data: bytes, table: int, number: int) -> Iterator[tuple[int, int]]:
    count, first = _vector(data, table, number, _PAIR.size)
    return _PAIR.iter_unpack(data[first : first + count * _PAIR.size])
