"""Labels: cells of a file to class numbers, with the names kept.

Names are strings; an integer label ``1`` is the name ``"1"``. The class order is that of ``data.labels``, else that of the data
set where it names its classes, else sorted, integers by their value, so that it does not depend on the order of the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.errors import DataError

if TYPE_CHECKING:
    from kdcache.data.files import Rows

NO_LABEL = -1
_SHOWN = 20  # names in a message
_INTEGER = re.compile(r"-?[0-9]+")


def label_cells(rows: Rows, column: str) -> list[str | None]:
    """The label column as names; None where the cell is empty or null. Raises DataError for values that name no class."""
    return [_name(value, rows, row, column) for row, value in enumerate(rows.column(column, "label"))]


def _name(value: Any, rows: Rows, row: int, column: str) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, float):
        if value != value:  # NaN is how some writers of Parquet say null
            return None
        if value.is_integer():
            return str(int(value))
    raise DataError(
        f"{rows.place(row)}, column '{column}': {value!r} is no class; a string or an integer was expected",
        "Name the label column in data.label; scores have to be cut into classes first.",
    )


def names_of(labels: Iterable[str | None], declared: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The class order where the recipe gives none."""
    if declared:
        return declared
    found = {label for label in labels if label is not None}
    if all(_INTEGER.fullmatch(name) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def label_numbers(
    rows: Rows, labels: Sequence[str | None], names: Sequence[str], *, scored: bool, listed_by: str = "training"
) -> np.ndarray:
    """int64[n] class numbers, -1 = none. Raises DataError for a label that is not among ``names``, and for none where ``scored``.

    Where no name is an integer, integers are taken as class numbers: files with 0 and 1 go with names given in the recipe.
    """
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    if not any(_INTEGER.fullmatch(name) for name in names):
        numbers |= {str(number): number for number in range(len(names))}
    if not scored:
        numbers[None] = NO_LABEL
    for row, label in enumerate(labels):
        if label not in numbers:
            raise _unknown(rows, row, label, names, listed_by)
    return np.fromiter((numbers[label] for label in labels), dtype=np.int64, count=len(labels))


def _unknown(rows: Rows, row: int, label: str | None, names: Sequence[str], listed_by: str) -> DataError:
    if label is None:
        return DataError(
            f"{rows.place(row)} has no label; rows of validation and test are scored, so each needs one",
            "Remove the row, or move texts without labels to data.transfer.",
        )
    known = ", ".join(f"'{name}'" for name in names[:_SHOWN]) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )
    return DataError(
        f"{rows.place(row)} has the label '{label}', which {listed_by} does not have; known: {known}",
        "Correct the row, or name every class in data.labels.",
    )
