"""Labels: cells of a file to class numbers and class names.

Names are strings; an integer label ``1`` is the name ``"1"``. The class order is that of ``data.labels``, else that of
the data set if it names its classes, else sorted, integers by value. It does not depend on the order of the rows.

A column without classes can look like one: scores, several labels in a cell, class numbers of another order, GLUE's -1
for a withheld label. Each is refused, unless ``data.labels`` declares these classes:

    3.8, -0.5       numbers that are not integers, in a file of any type
    -1              beside two or more other classes, none of them negative: a class, or no label
    ["a", "b"]      a list; also ``a|b`` where ``a`` and ``b`` are classes of their own
    0, 1, 2         if the classes are names, and only their alphabetical order determines which is number 0
    "pos", "pos "   names that differ in white space only
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from kdcache.errors import DataError
from kdcache.progress import listed

if TYPE_CHECKING:
    from kdcache.data.reading import Rows

NO_LABEL = -1
_INTEGER = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SEPARATORS = "|;,"  # of several labels in one cell
_WITHHELD = "-1"
_DECLARE = "name every class in data.labels, in class order"
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f]")
_FEW_ROWS, _MANY_CLASSES = 8, 10


@dataclass(frozen=True)
class ClassOrder:
    """The classes in their order; ``declared`` by a recipe key, a data set or a model, empty if only sorted."""

    names: tuple[str, ...]
    declared: str = ""
    source: str = "training"  # where the names were found

    @property
    def numbered(self) -> bool:
        """Whether an integer can be a class number: the order is declared, and no name is an integer.

        The order of false and true is always known.
        """
        if tuple(name.lower() for name in self.names) == ("false", "true"):
            return True
        return bool(self.declared) and not any(_INTEGER.fullmatch(name) for name in self.names)


def numbers_known(names: Sequence[str], *, declared: bool) -> bool:
    """Whether an integer label has a known class: names are integers, or their order is declared."""
    return (
        all(_INTEGER.fullmatch(name) for name in names)
        or ClassOrder(tuple(names), "declared" if declared else "").numbered
    )


def label_cells(rows: Rows, column: str, known: Iterable[str] = ()) -> list[str | None]:
    """The label column as names, None for cells without text and nulls. Raises DataError for values that are no class.

    ``known``: names that are always accepted as classes.
    """
    names = frozenset(known)
    return [_name(value, rows, row, column, names) for row, value in enumerate(rows.column(column, "label"))]


def _name(value: Any, rows: Rows, row: int, column: str, known: frozenset[str]) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        if not value.strip() and value not in known:
            return None
        if value not in known and _NUMBER.fullmatch(value) and not _is_whole(float(value)):
            _refuse_number(rows, row, column, value)
        return value
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, float):
        if value != value:  # some writers of Parquet store null as NaN
            return None
        if value.is_integer():
            return str(int(value))
        if str(value) in known:
            return str(value)
        _refuse_number(rows, row, column, value)
    if isinstance(value, list | tuple):
        raise DataError(
            f"{_cell(rows, row, column)}: {listed([value])} is no class but a list: multi-label data are not supported",
            "Give one label per row: write a column with the label to be learned, and name it in data.label.",
        )
    raise DataError(
        f"{_cell(rows, row, column)}: {listed([repr(value)])} is no class; a string or an integer was expected",
        "Name the label column in data.label.",
    )


def _is_whole(number: float) -> bool:
    return number.is_integer() or math.isinf(number)  # an integer with too many digits for a float becomes infinite


def _refuse_number(rows: Rows, row: int, column: str, value: object) -> NoReturn:
    raise DataError(
        f"{_cell(rows, row, column)}: {value} is no class; a string or an integer was expected (regression is not "
        "supported)",
        f"Divide scores into classes first; if such numbers are classes, {_DECLARE}.",
    )


def class_order(
    rows: Rows, labels: Sequence[str | None], column: str, given: Sequence[str] | None = None
) -> ClassOrder:
    """The classes of ``labels``, the cells of ``column``: ``given`` (data.labels), the data set's, or sorted.

    Raises DataError if none are given and the labels may not be classes, or their order is unknown.
    """
    if given:
        return ClassOrder(tuple(given), "data.labels")
    declared = rows.class_names.get(column)
    if declared:
        return ClassOrder(declared, "the data set")
    names = {label for label in labels if label is not None}
    _refuse_twins(rows, labels, column)
    _refuse_withheld(rows, labels, column, names)
    _refuse_several(rows, labels, column, names)
    integers = sorted((name for name in names if _INTEGER.fullmatch(name)), key=lambda name: (int(name), name))
    words = sorted(names - set(integers))
    count = 2 if {word.lower() for word in words} <= {"false", "true"} else len(words)
    if words and integers and count > 1 and all(0 <= int(name) < count for name in integers):
        _refuse_mixed(rows, labels.index(integers[0]), column, integers[0], words, "the same column")
    return ClassOrder(tuple(integers if not words else sorted(names)), "", rows.source)


def refuse_odd_names(what: str, names: Iterable[str]) -> None:
    """Raises DataError for names of classes or columns that a cache cannot hold."""
    odd = next((name for name in names if not name or _CONTROL.search(name)), None)
    if odd is not None:
        raise DataError(f"{what} {odd!r} is empty or holds a control character", "Rename it in the data.")


def _refuse_twins(rows: Rows, labels: Sequence[str | None], column: str) -> None:
    """Refuse ``pos `` beside ``pos``: a stray space, which would be a class of its own."""
    of_stripped: dict[str, str] = {}
    for name in (label for label in labels if label is not None):
        twin = of_stripped.setdefault(name.strip(), name)
        if twin != name:
            place = _cell(rows, labels.index(name), column)
            raise DataError(
                f"{place}: the label is {name!r}, and the same column has {twin!r}: they differ in white space only",
                f"Correct the file; if both are classes, {_DECLARE}.",
            )


def _refuse_withheld(rows: Rows, labels: Sequence[str | None], column: str, names: set[str]) -> None:
    """Refuse -1 beside 0 and 1, which may be a withheld label; with other negative numbers it is a class."""
    others = names - {_WITHHELD}
    if (
        _WITHHELD not in names
        or len(others) < 2
        or any(name.startswith("-") and _INTEGER.fullmatch(name) for name in others)
    ):
        return
    raise DataError(
        f"{_cell(rows, labels.index(_WITHHELD), column)}: the label -1 is a class, or stands for no label as in GLUE; "
        "which is not known",
        f"Leave the cell empty if there is no label; if -1 is a class, {_DECLARE}.",
    )


def _refuse_several(rows: Rows, labels: Sequence[str | None], column: str, names: set[str]) -> None:
    for name, parts in _compounds(names):
        if all(part in names for part in parts):
            _refuse_multilabel(rows, labels.index(name), column, name, parts)


def _refuse_multilabel(rows: Rows, row: int, column: str, name: str, parts: Sequence[str]) -> NoReturn:
    raise DataError(
        f"{_cell(rows, row, column)}: '{listed([name])}' is several labels, {listed(parts, quoted=True)}, each a class "
        "of its own: multi-label data are not supported",
        f"Give one label per row; if the combination is a class, {_DECLARE}.",
    )


def _compounds(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Names that a separator splits into two or more parts, with the parts."""
    for name in sorted(names):
        for separator in _SEPARATORS:
            parts = [part.strip() for part in name.split(separator)]
            if len(parts) > 1 and all(parts):
                yield name, parts


def _refuse_mixed(rows: Rows, row: int, column: str, label: str, names: Sequence[str], where: str) -> NoReturn:
    raise DataError(
        f"{_cell(rows, row, column)}: the label is '{label}', and {where} has {listed(names, quoted=True)}: "
        "which name belongs to which number is not known",
        "Correct the row, or name the classes in data.labels, in the order of the numbers (for kdcache evaluate: "
        "--labels, once per class).",
    )


def label_numbers(
    rows: Rows, labels: Sequence[str | None], order: ClassOrder, column: str, *, scored: bool
) -> np.ndarray:
    """Class numbers int64[n], -1 = none.

    Raises DataError for an unknown label and, if ``scored``, for a missing one. If the class order is declared and no
    name is an integer, integers are class numbers: a file with 0 and 1 fits names from the recipe or a data set.
    """
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(order.names)}
    if order.numbered and not other_integers(rows.class_names.get(column, ())):
        numbers |= {str(number): number for number in range(len(order.names))}
    if not scored:
        numbers[None] = NO_LABEL
    for row, label in enumerate(labels):
        if label not in numbers:
            _refuse_unknown(rows, row, label, order, column)
    return np.fromiter((numbers[label] for label in labels), dtype=np.int64, count=len(labels))


def other_integers(class_names: Sequence[str]) -> bool:
    """Whether the class names of a data set are integers other than their numbers."""
    return any(_INTEGER.fullmatch(name) and name != str(number) for number, name in enumerate(class_names))


def _refuse_unknown(rows: Rows, row: int, label: str | None, order: ClassOrder, column: str) -> NoReturn:
    names = order.names
    listed_by = "training" if not order.declared else order.declared
    if label is None:
        raise DataError(
            f"{rows.place(row)} has no label; rows of validation and test are scored, so each needs one",
            "Remove the row, or move texts without labels to data.transfer.",
        )
    if label == _WITHHELD:
        raise DataError(
            f"{rows.place(row)} has the label '-1', which {listed_by} does not have; in GLUE it stands for a label "
            "that is withheld",
            "Leave the cell of an unlabelled training row empty; score on a split that has labels, for example the "
            "validation split.",
        )
    parts = next((parts for _, parts in _compounds([label]) if all(part in names for part in parts)), None)
    if parts is not None:
        _refuse_multilabel(rows, row, column, label, parts)
    kinds = {bool(_INTEGER.fullmatch(name)) for name in names}
    if not order.declared and kinds == {not _INTEGER.fullmatch(label)}:
        _refuse_mixed(rows, row, column, label, names, order.source)
    raise DataError(
        f"{rows.place(row)} has the label '{listed([label])}', which {listed_by} does not have; known: "
        f"{listed(names, quoted=True)}",
        "Correct the row, or name every class in data.labels.",
    )


def label_warnings(order: ClassOrder, labels: np.ndarray) -> list[str]:
    """Warnings about suspicious classes of ``labels`` int64[n]: many with few rows, and names like ``a|b``."""
    warnings = []
    counts = np.bincount(labels[labels >= 0], minlength=len(order.names))
    few = int((counts < _FEW_ROWS).sum())
    if len(order.names) >= _MANY_CLASSES and 2 * few > len(order.names):
        warnings.append(
            f"{few:,} of the {len(order.names):,} classes have fewer than {_FEW_ROWS} rows of train: is the label "
            "column the right one, and does it hold classes?"
        )
    if not order.declared:
        times = Counter(part for _, parts in _compounds(order.names) for part in set(parts))
        shared = [name for name, parts in _compounds(order.names) if any(times[part] > 1 for part in parts)]
        if shared:
            warnings.append(
                f"{len(set(shared)):,} classes look like several labels in one, such as '{listed(shared[:1])}': each "
                "combination is learned as a class of its own"
            )
    return warnings


def _cell(rows: Rows, row: int, column: str) -> str:
    return f"{rows.place(row)}, column '{column}'"
