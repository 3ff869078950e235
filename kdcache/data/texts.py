"""The text columns of rows, checked, and their ids: what every later stage joins by."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from kdcache.cache.ids import text_id
from kdcache.errors import DataError

if TYPE_CHECKING:
    from kdcache.data.files import Rows


def column_texts(rows: Rows, names: Sequence[str]) -> list[tuple[str, ...]]:
    """One tuple of ``names``' values per row, exactly as in the file: it is what tokenizers are given and ids are made of.

    Raises DataError for a missing column, and for a text that is empty, no string, or holds a NUL.
    """
    columns = []
    for name in names:
        values = rows.column(name, "text")
        for row, value in enumerate(values):
            if not isinstance(value, str) or not value.strip() or "\0" in value:
                raise _unusable(rows, row, name, value)
        columns.append(values)
    return list(zip(*columns, strict=True))


def _unusable(rows: Rows, row: int, name: str, value: object) -> DataError:
    place = f"{rows.place(row)}, column '{name}'"
    if value is None or (isinstance(value, str) and not value.strip()):
        return DataError(f"{place}: the text is empty", "Remove the row, or give it a text.")
    if isinstance(value, str):
        return DataError(f"{place}: the text holds a NUL character", "Remove it from the row.")
    return DataError(
        f"{place}: {value!r} is no text but {type(value).__name__}", "Name a text column in data.text, or store it as a string."
    )


def ids_of(rows: Rows, texts: Sequence[tuple[str, ...]]) -> list[bytes]:
    """Text ids. Raises DataError with the line for a text that is no Unicode (half of a surrogate pair out of a JSON escape)."""
    ids = []
    for row, text in enumerate(texts):
        try:
            ids.append(text_id(text))
        except DataError as error:
            raise DataError(f"{rows.place(row)}: {error.message}", error.hint) from error
    return ids


def seeded_keys(ids: Sequence[bytes], seed: int, purpose: str) -> list[int]:
    """A number in 0 .. 2^64 - 1 per text, evenly spread: a pure function of text, seed and purpose."""
    key, person = seed.to_bytes(8, "little"), purpose.encode()
    return [int.from_bytes(blake2b(identity, digest_size=8, key=key, person=person).digest(), "little") for identity in ids]
