"""Arrow files.

Exactly the expected schema and rows, or an error; never a crash, never an allocation by what a file claims.
"""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pyarrow as pa
import pytest

from kdcache.cache import tables
from kdcache.cache.tables import TableDamageError
from kdcache.cache.tokens import Outputs, Tokens

IDS = np.arange(80, dtype=np.uint8).reshape(5, 16)


def tokens_of(lengths: list[int]) -> Tokens:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    return Tokens(offsets, *(np.arange(total).astype(dtype) % 5 for dtype in (np.int32, np.int32, np.int8, np.int8)))


def table(schema: pa.Schema, batches: list[pa.RecordBatch], **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def test_empty_parts_and_texts_without_tokens() -> None:
    assert tables.decode_ids(tables.encode_ids(IDS[:0]), 0).shape == (0, 16)
    assert tables.decode_text(tables.encode_text(["a", "b"], []), ["a", "b"], 0) == []
    assert tables.decode_outputs(
        tables.encode_outputs(Outputs(np.zeros((0, 3), np.float32))), 0, 3, None
    ).logits.shape == (0, 3)
    assert tables.decode_tokens(tables.encode_tokens(tokens_of([])), 0, 0).offsets.tolist() == [0]
    assert tables.decode_tokens(tables.encode_tokens(tokens_of([0, 3, 0])), 3, 3).lengths.tolist() == [0, 3, 0]


def test_labels_and_groups_may_be_missing() -> None:
    labels = np.array([0, -1, 2, -1, 1])
    assert tables.decode_examples(tables.encode_examples(IDS, labels, None), 5, 3)[1:] == (pytest.approx(labels), None)
    groups = ("a", "b", "", "d", "e")
    assert tables.decode_examples(tables.encode_examples(IDS, labels, groups), 5, 3)[2] == groups


def test_a_compressed_file_is_refused_before_it_is_decompressed() -> None:
    zeros = np.zeros((100_000, 16), np.uint8)
    batch = pa.record_batch([tables._id_column(zeros)], schema=tables.ids_schema())
    with pytest.raises(TableDamageError, match="compressed"):
        tables.decode_ids(table(tables.ids_schema(), [batch], compression="zstd"), 100_000)


def test_other_schemas_rows_and_batches_are_refused() -> None:
    batch = pa.record_batch([tables._id_column(IDS)], schema=tables.ids_schema())
    with pytest.raises(TableDamageError, match="schema"):
        tables.decode_ids(tables.encode_text(["a"], [("x",)] * 5), 5)
    with pytest.raises(TableDamageError, match="has 5 rows, expected 4"):
        tables.decode_ids(tables.encode_ids(IDS), 4)
    with pytest.raises(TableDamageError, match="more than one"):
        tables.decode_ids(table(tables.ids_schema(), [batch, batch]), 5)
    with pytest.raises(TableDamageError, match="no record batch"):
        tables.decode_ids(table(tables.ids_schema(), []), 0)
    with pytest.raises(TableDamageError, match="holds 4 tokens, 5 expected"):
        tables.decode_tokens(tables.encode_tokens(tokens_of([2, 2])), 2, 5)
    with pytest.raises(TableDamageError, match="not an Arrow file"):
        tables.decode_ids(b"", 0)


def test_nulls_are_refused_where_there_are_none() -> None:
    schema = tables.outputs_schema(2, None)
    column = pa.array([[1.0, 2.0], None], type=schema.field(0).type)
    with pytest.raises(TableDamageError, match="null"):
        tables.decode_outputs(table(schema, [pa.RecordBatch.from_arrays([column], schema=schema)]), 2, 2, None)


def test_a_file_with_changed_bytes_is_read_or_refused_and_never_crashes() -> None:
    rng = random.Random(0)
    cases = [
        (tables.encode_tokens(tokens_of([2, 0, 3])), lambda data: tables.decode_tokens(data, 3, 5)),
        (
            tables.encode_text(["a", "b"], [("x", "yé"), ("", "z")]),
            lambda data: tables.decode_text(data, ["a", "b"], 2),
        ),
        (
            tables.encode_outputs(Outputs(np.ones((4, 3), np.float32))),
            lambda data: tables.decode_outputs(data, 4, 3, None),
        ),
    ]
    for encoded, decode in cases:
        for _ in range(800):
            damaged = bytearray(encoded)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            with contextlib.suppress(TableDamageError):
                decode(bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])]))
