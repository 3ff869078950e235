"""A split of a cache as an Arrow table: labels, texts and the logits of the teachers, one row per example.

The columns are those of an exported cache: the text columns, ``label``, ``logits_TEACHER``, ``row``, ``text_id``. They
are read part by part, so ``record_batches`` never holds more than one part. ``to_arrow`` puts them in the order of the
split. pyarrow is imported late: opening a cache does not need it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.ids import id_list
from kdcache.cache.selection import Selection
from kdcache.errors import MismatchError, RecipeError

if TYPE_CHECKING:
    from kdcache.cache.ids import Examples
    from kdcache.cache.reader import Cache


def record_batches(cache: Cache, split: str, teachers: Sequence[str] | None, *, text: bool | None) -> Any:
    """A ``pyarrow.RecordBatchReader``; see ``Cache.to_batches``."""
    import pyarrow as pa

    names = list(cache.teachers) if teachers is None else list(dict.fromkeys(teachers))
    with_text = cache.has_text_here if text is None else text
    if with_text and not cache.has_text_here:
        raise MismatchError(f"the texts of cache '{cache.path}' are not here", "Leave them out with text=False.")
    examples = cache.examples(split)
    cache.select(Selection(dict.fromkeys(names, ()), text=with_text))
    schema = _schema(cache, names, cache.task.text_columns if with_text else ())
    parts, places = locate_rows(cache, split, examples)

    def batches() -> Iterator[Any]:
        for part in np.unique(parts).tolist():
            rows = np.flatnonzero(parts == part)
            name, of_part = cache.parts[part].name, places[rows]
            stored = cache.texts(name) if with_text else ()
            texts = text_values(cache.task.text_columns, [stored[place] for place in of_part.tolist() if with_text])
            values = texts | values_of_rows(cache, examples, rows, name, of_part, names)
            yield pa.record_batch([_array(values[field.name], field) for field in schema], schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def to_arrow(cache: Cache, split: str, teachers: Sequence[str] | None, *, text: bool | None) -> Any:
    """A ``pyarrow.Table`` in the order of the split; see ``Cache.to_arrow``."""
    table = record_batches(cache, split, teachers, text=text).read_all().combine_chunks()
    return table.take(np.argsort(table["row"].to_numpy(), kind="stable"))


def to_pandas(cache: Cache, split: str, teachers: Sequence[str] | None, *, text: bool | None) -> Any:
    """A ``pandas.DataFrame``; see ``Cache.to_pandas``."""
    try:
        import pandas as pd
    except ImportError as error:
        raise RecipeError(
            "to_pandas needs the package 'pandas', which is not installed",
            "Install it: pip install pandas; or use to_arrow.",
        ) from error
    import pyarrow as pa

    labels = {pa.int64(): pd.Int64Dtype()}  # whole numbers, also where some labels are missing
    return to_arrow(cache, split, teachers, text=text).to_pandas(types_mapper=labels.get)


def locate_rows(cache: Cache, split: str, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """The part, and the place in it, of the text of every row, int64[n] each. MismatchError for texts not there."""
    parts, places = cache.locate(examples.text_ids)
    if len(parts) and parts.min() < 0:
        raise MismatchError(
            f"cache '{cache.path}' lacks {int((parts < 0).sum()):,} texts of split '{split}'",
            "Dump them with kdcache dump-teachers.",
        )
    return parts, places


def text_values(columns: Sequence[str], texts: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """The text columns of rows, by name."""
    return {column: [text[number] for text in texts] for number, column in enumerate(columns)}


def values_of_rows(
    cache: Cache,
    examples: Examples,
    rows: np.ndarray,
    part: str,
    places: np.ndarray,
    teachers: Sequence[str],
) -> dict[str, Any]:
    """The columns of ``rows`` of a split without their texts, by name.

    ``places`` are those of their texts in ``part``.
    """
    return {
        "label": np.asarray(examples.labels)[rows].astype(np.int64),
        **{f"logits_{teacher}": cache.outputs(teacher, part).logits[places] for teacher in teachers},
        "row": rows.astype(np.int64),
        "text_id": [one.hex() for one in id_list(np.asarray(examples.text_ids)[rows])],
    }


def _array(values: Any, field: Any) -> Any:
    import pyarrow as pa

    if field.name == "label":
        return pa.array(values, type=field.type, mask=values < 0)
    if pa.types.is_fixed_size_list(field.type):
        return pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(values).reshape(-1), type=field.type)
    return pa.array(values, type=field.type)


def _schema(cache: Cache, teachers: Sequence[str], texts: Sequence[str]) -> Any:
    """With the features of ``datasets``, which then knows the names of the classes."""
    import pyarrow as pa

    specs, classes = cache.teachers, len(cache.task.label_names)
    for teacher in teachers:
        if teacher not in specs:
            known = ", ".join(specs) or "none"
            raise MismatchError(
                f"cache '{cache.path}' has no teacher '{teacher}'; it has: {known}", "Name one of these."
            )
    logits = [f"logits_{teacher}" for teacher in teachers]
    fields: list[Any] = [
        *((name, pa.string()) for name in texts),
        ("label", pa.int64()),
        *((name, pa.list_(pa.float32(), classes)) for name in logits),
        ("row", pa.int64()),
        ("text_id", pa.string()),
    ]
    twice = [name for name in texts if name in ("label", "row", "text_id", *logits)]
    if twice:
        raise MismatchError(
            f"the text column '{twice[0]}' of cache '{cache.path}' has the name of another column",
            "Leave the texts out with text=False.",
        )
    features: dict[str, Any] = {
        name: {"feature": {"dtype": "float32", "_type": "Value"}, "length": classes, "_type": "List"}
        if name in logits
        else {"dtype": str(kind), "_type": "Value"}
        for name, kind in fields
    }
    features["label"] = {"names": list(cache.task.label_names), "_type": "ClassLabel"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
