"""The texts of rows: what tokenizers get, what counts as text, and the id of each."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import compress
from typing import TYPE_CHECKING

from kdcache.cache.ids import text_id
from kdcache.errors import DataError

if TYPE_CHECKING:
    from kdcache.data.reading import Rows


def column_texts(rows: Rows, names: Sequence[str]) -> list[tuple[str, ...]]:
    """One tuple of the columns ``names`` per row, unchanged: the input of tokenizers and of text ids.

    A null becomes the empty string. Raises DataError for a missing column, and for texts that are no strings or hold a
    NUL.
    """
    columns = []
    for name in names:
        values = ["" if value is None else value for value in rows.column(name, "text")]
        for row, value in enumerate(values):
            if not isinstance(value, str) or "\0" in value:
                raise _unusable(rows, row, name, value)
        columns.append(values)
    return list(zip(*columns, strict=True))


def has_text(text: tuple[str, ...]) -> bool:
    """Whether a column has more than white space, as Python defines it.

    A pair with one empty column has text. Other invisible characters, such as U+200B, count as text, because some
    tokenizers make tokens of them.
    """
    return any(column.strip() for column in text)


def rows_with_text(rows: Rows, names: Sequence[str]) -> tuple[Rows, list[tuple[str, ...]], int]:
    """The rows with text in a column of ``names``, their texts, and the number of other rows.

    Raises DataError if no row has text, and as ``column_texts``.
    """
    texts = column_texts(rows, names)
    keep = [has_text(text) for text in texts]
    left_out = keep.count(False)
    if not left_out:
        return rows, texts, 0
    if left_out == len(keep):
        raise no_text(rows.source, names)
    return rows.take(keep), list(compress(texts, keep)), left_out


def no_text(source: str, names: Sequence[str]) -> DataError:
    """The error for a file without any text."""
    columns = " and ".join(f"'{name}'" for name in names)
    return DataError(
        f"{source} has no text in any row of {columns}", "Name the column that holds the text in data.text."
    )


def _unusable(rows: Rows, row: int, name: str, value: object) -> DataError:
    place = f"{rows.place(row)}, column '{name}'"
    if isinstance(value, str):
        return DataError(f"{place}: the text holds a NUL character", "Remove it from the row.")
    return DataError(
        f"{place}: {value!r} is no text but {type(value).__name__}",
        "Name a text column in data.text, or store it as a string.",
    )


def ids_of(rows: Rows, texts: Sequence[tuple[str, ...]]) -> list[bytes]:
    """Text ids; DataError with the line for invalid Unicode (a lone surrogate from a JSON escape)."""
    ids = []
    for row, text in enumerate(texts):
        try:
            ids.append(text_id(text))
        except DataError as error:
            raise DataError(f"{rows.place(row)}: {error.message}", error.hint) from error
    return ids


def seeded_keys(ids: Sequence[bytes], seed: int, purpose: str) -> list[int]:
    """A uniform number in 0 .. 2^64 - 1 per text: a pure function of text, seed and purpose."""
    key, person = seed.to_bytes(8, "little"), purpose.encode()
    return [
        int.from_bytes(blake2b(identity, digest_size=8, key=key, person=person).digest(), "little") for identity in ids
    ]
