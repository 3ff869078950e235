"""Tables as the bytes of a Parquet file or of JSON lines, one table in memory at a time, every value exact."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Column:
    """A column beside the text: ``width`` numbers per row; 0 for one value."""

    name: str
    kind: str  # of pyarrow
    width: int = 0


def as_parquet(
    tables: Iterator[Mapping[str, Any]], text: Sequence[str], columns: Sequence[Column], label_names: Sequence[str]
) -> Iterator[bytes]:
    """A Parquet file, a row group per part; bytes are handed on as they are made."""
    import pyarrow as pa
    from pyarrow import parquet

    schema, sink = _schema(text, columns, label_names), _Drained()
    with parquet.ParquetWriter(pa.PythonFile(sink, mode="w"), schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(pa.table([_array(table[field.name], field) for field in schema], schema=schema))
            yield sink.take()
    yield sink.take()


class _Drained(io.RawIOBase):
    """A file in memory whose bytes can be taken out while it is written."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._blocks.append(bytes(data))
        return len(self._blocks[-1])

    def take(self) -> bytes:
        """The bytes since the last call."""
        blocks, self._blocks = self._blocks, []
        return b"".join(blocks)


def _schema(text: Sequence[str], columns: Sequence[Column], label_names: Sequence[str]) -> Any:
    """With the features of ``datasets``, which then knows the names of the classes."""
    import pyarrow as pa

    features: dict[str, Any] = {name: {"dtype": "string", "_type": "Value"} for name in text}
    fields = [pa.field(name, pa.string()) for name in text]
    for column in columns:
        kind: Any = getattr(pa, column.kind)()
        value: dict[str, Any] = {"dtype": column.kind, "_type": "Value"}
        if column.name == "label" and column.kind == "int64":
            value = {"names": list(label_names), "_type": "ClassLabel"}
        if column.width:
            kind, value = pa.list_(kind, column.width), {"feature": value, "length": column.width, "_type": "List"}
        features[column.name] = value
        fields.append(pa.field(column.name, kind))
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _array(values: Any, field: Any) -> Any:
    import pyarrow as pa

    if field.name == "label" and isinstance(values, np.ndarray):
        return pa.array(values, type=field.type, mask=values < 0)
    if pa.types.is_fixed_size_list(field.type):
        return pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(values).reshape(-1), type=field.type)
    return pa.array(values, type=field.type)


def as_jsonl(tables: Iterator[Mapping[str, Any]]) -> Iterator[bytes]:
    """A block of JSON lines per table."""
    for table in tables:
        cells = [_cells(name, values) for name, values in table.items()]
        names = [json.dumps(name, ensure_ascii=False) for name in table]
        lines = (
            "{" + ", ".join(f"{name}: {cell}" for name, cell in zip(names, row, strict=True)) + "}\n"
            for row in zip(*cells, strict=True)
        )
        yield "".join(lines).encode()


def _cells(name: str, values: Any) -> list[str]:
    if not isinstance(values, np.ndarray):
        return [json.dumps(value, ensure_ascii=False) for value in values]
    if values.ndim == 2:  # the shortest digits that give the same float32
        return ["[" + ", ".join(row) + "]" for row in values.astype(str).tolist()]
    return ["null" if name == "label" and value < 0 else str(value) for value in values.tolist()]
