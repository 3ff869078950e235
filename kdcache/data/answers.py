"""Soft labels from elsewhere: files of probabilities, logits, labels or votes, as logits by text id.

An LLM judge, a vendor's classifier or annotators answered for texts; a cache takes these answers as a teacher. Rows
join by the content of their text. Every row is checked: what is not usable is an error with file and line.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kdcache.cache.ids import id_array
from kdcache.data.reading import read_rows
from kdcache.data.texts import column_texts, has_text, ids_of
from kdcache.errors import DataError, RecipeError
from kdcache.files import FileDigest, digest_bytes
from kdcache.progress import listed

if TYPE_CHECKING:
    from kdcache.cache.spec import TaskSpec
    from kdcache.data.reading import Rows

Kind = Literal["logits", "probabilities", "labels", "votes"]
KINDS: tuple[Kind, ...] = ("logits", "probabilities", "labels", "votes")
FLOOR = 1e-6  # smaller probabilities become this one: the logarithm of 0 is not finite
SMOOTHING: Mapping[Kind, float] = {"logits": 0.0, "probabilities": 0.0, "labels": 0.1, "votes": 0.1}
_SUM = 1e-3  # by which the sum of probabilities may differ from 1
_LARGEST = float(np.finfo(np.float32).max)
_ENDINGS = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv")


@dataclass(frozen=True)
class AnswerFormat:
    """How a file gives its answers.

    Attributes:
        kind: what the columns hold.
        columns: (class, column) each; the class is None for a column with a list in class order, an object by class
            name, or labels. With two classes, one column may hold the logit or the probability of one of them.
        text: the text columns; None: those of the cache.
        names: class names of the file and what the cache calls them.
        smoothing: share of the equal distribution that is mixed in; None: that of the kind.
    """

    kind: Kind
    columns: tuple[tuple[str | None, str], ...]
    text: tuple[str, ...] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    smoothing: float | None = None

    @property
    def share(self) -> float:
        """The smoothing that is used."""
        return SMOOTHING[self.kind] if self.smoothing is None else self.smoothing


@dataclass(frozen=True, eq=False)
class Answers:
    """The logits of ``n`` distinct texts, in the order of their ids, and where they came from."""

    ids: np.ndarray  # uint8[n, 16]
    logits: np.ndarray  # float32[n, classes]
    kind: Kind
    smoothing: float
    record: Mapping[str, Any]  # provenance: files, columns, counts

    @property
    def fingerprint(self) -> str:
        """sha256 over ids and logits: files of another format with the same answers are the same teacher."""
        return hashlib.sha256(self.ids.tobytes() + self.logits.astype("<f4").tobytes()).hexdigest()


def read_answers(path: Path, task: TaskSpec, how: AnswerFormat) -> Answers:
    """Read a file, or a directory that ``kdcache cache export`` wrote.

    Raises RecipeError for columns or classes that do not fit, DataError (with file and line) for rows that are not
    usable, and for texts with different answers.
    """
    _check_format(task, how)
    tables = [read_rows(str(file)) for file in _files(path)]
    found = [_of_table(rows, task, how) for rows in tables]
    ids = [one for table in found for one in table.ids]
    places = [(rows, row) for rows, table in zip(tables, found, strict=True) for row in table.rows]
    if not ids:
        raise DataError(f"{path} has no answer in any row", "Name the columns with the answers: --column COLUMN.")
    order, first, group = np.unique(id_array(ids), axis=0, return_index=True, return_inverse=True)
    values = np.concatenate([table.values for table in found if len(table.ids)])
    joined = _joined(values, first, group.reshape(-1), places, how.kind)
    logits, floored = _as_logits(joined, how)
    digests = {file.name: _digest(file) for file in _files(path)}
    record = {
        "files": {name: {"bytes": digest.size, "sha256": digest.sha256} for name, digest in digests.items()},
        "answers": how.kind,
        "columns": [column if label is None else f"{label}={column}" for label, column in how.columns],
        "text_columns": list(how.text or task.text_columns),
        "labels": dict(how.names),
        "smoothing": f"{how.share:g}",
        "rows": sum(len(rows) for rows in tables),
        "rows_without_answer": sum(table.empty for table in found),
        "rows_of_a_text_again": len(ids) - len(order),
        "probabilities_raised_to_1e-06": floored,
    }
    return Answers(order, logits, how.kind, how.share, record)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    place = path / "data" if (path / "data").is_dir() else path
    files = sorted(file for file in place.glob("*") if file.suffix in _ENDINGS) if path.is_dir() else []
    if not files:
        raise DataError(f"there is no file '{path}' with answers", f"Name a file ({', '.join(_ENDINGS)}).")
    return files


def _digest(file: Path) -> FileDigest:
    return digest_bytes(file.read_bytes())


def _check_format(task: TaskSpec, how: AnswerFormat) -> None:
    classes, cure = task.label_names, "Such as: --column negative=p_negative --column positive=p_positive"
    if not how.columns:
        raise RecipeError("no column with answers is named", cure)
    if not 0 <= how.share < 1 or (how.kind == "logits" and how.share):
        raise RecipeError(
            f"--smoothing is {how.share:g}; it is a share from 0 to below 1, and 0 for logits",
            "Such as: --smoothing 0.1",
        )
    for label in [*how.names.values(), *(label for label, _ in how.columns if label is not None)]:
        if label not in classes:
            known = listed(classes, quoted=True)
            raise RecipeError(f"'{label}' is no class of the cache; it has: {known}", "Name one of these classes.")
    named = [label for label, _ in how.columns]
    if how.kind in ("labels", "votes"):
        if any(label is not None for label in named) or (how.kind == "labels" and len(named) > 1):
            raise RecipeError(
                f"--as {how.kind} takes columns that hold labels, and not CLASS=COLUMN; '--as labels' takes one",
                "Such as: --as votes --column annotator1 --column annotator2",
            )
    elif not (named == [None] or (len(named) == 1 and len(classes) == 2) or sorted(map(str, named)) == sorted(classes)):
        lacking = [label for label in classes if label not in named]
        raise RecipeError(
            f"the columns give {listed(map(str, named), quoted=True)}; a column for each class was expected, or one "
            f"with a list (missing: {listed(lacking, quoted=True) or 'none'}; each class once)",
            cure,
        )


@dataclass(frozen=True)
class _Table:
    """The usable rows of a file: ``values`` float64[n, classes], logits, probabilities or counts of votes."""

    ids: list[bytes]
    rows: list[int]
    values: np.ndarray
    empty: int


def _of_table(rows: Rows, task: TaskSpec, how: AnswerFormat) -> _Table:
    text = how.text or task.text_columns
    if len(text) != len(task.text_columns):
        raise RecipeError(
            f"--text names {len(text)} columns; the texts of the cache have {len(task.text_columns)}",
            f"The cache's own are: {listed(task.text_columns, quoted=True)}.",
        )
    for name, flag in [*((one, "--text") for one in text), *((one, "--column") for _, one in how.columns)]:
        if name not in rows.columns:
            raise DataError(
                f"{rows.source} has no column '{name}'; it has: {listed(rows.columns, quoted=True)}",
                f"Name one of these with {flag}.",
            )
    texts = column_texts(rows, text)
    ids = ids_of(rows, texts)
    cells = [rows.columns[column] for _, column in how.columns]
    values = np.zeros((len(rows), len(task.label_names)))
    kept = []
    for row, one in enumerate(texts):
        given = [column[row] for column in cells]
        if has_text(one) and not all(_is_empty(cell) for cell in given):
            values[row] = list(_row(rows, row, given, task.label_names, how))
            kept.append(row)
    return _Table([ids[row] for row in kept], kept, values[kept], len(rows) - len(kept))


def _is_empty(cell: Any) -> bool:
    return cell is None or cell == "" or (isinstance(cell, list | dict) and not cell)


def _row(rows: Rows, row: int, given: Sequence[Any], classes: Sequence[str], how: AnswerFormat) -> Sequence[float]:
    if how.kind in ("labels", "votes"):
        return _counted(rows, row, given, classes, how)
    numbers = _by_class(rows, row, given, classes, how)
    if how.kind == "probabilities":
        total = sum(numbers)
        if min(numbers) < 0 or max(numbers) > 1 + _SUM or abs(total - 1) > _SUM:
            raise DataError(
                f"{rows.place(row)}: the probabilities {listed([f'{one:g}' for one in numbers])} sum to {total:.6g}; "
                "numbers from 0 to 1 that sum to 1 were expected",
                "For scores before the softmax, use --as logits.",
            )
        return [one / total for one in numbers]
    return numbers


def _by_class(rows: Rows, row: int, given: Sequence[Any], classes: Sequence[str], how: AnswerFormat) -> list[float]:
    """One number per class, from columns of their own, from one list, or from one object."""
    (label, column), cell = how.columns[0], given[0]
    if len(how.columns) == 1 and label is not None:  # of one of two classes
        value = _number(rows, row, column, cell)
        other = 1 - value if how.kind == "probabilities" else 0.0
        return [value if name == label else other for name in classes]
    if label is not None:
        columns = {str(name): (one, value) for (name, one), value in zip(how.columns, given, strict=True)}
        return [_number(rows, row, *columns[name]) for name in classes]
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            cell = None
    if isinstance(cell, Mapping):
        named = {_class_of(rows, row, column, name, classes, how): value for name, value in cell.items()}
        cell = [named.get(name) for name in classes]
    if not isinstance(cell, list | tuple) or len(cell) != len(classes):
        raise DataError(
            f"{rows.place(row)}, column '{column}': {listed([repr(given[0])])} is not a list of {len(classes)} "
            "numbers, one per class of the cache in its order, nor an object by class name",
            f"The classes are: {listed(classes, quoted=True)}. For columns of their own: --column CLASS=COLUMN.",
        )
    return [_number(rows, row, column, value) for value in cell]


def _number(rows: Rows, row: int, column: str, cell: Any) -> float:
    try:
        value = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or abs(value) > _LARGEST:
        raise DataError(
            f"{rows.place(row)}, column '{column}': {listed([repr(cell)])} is not a finite number",
            "Correct the row, or leave all its answers empty.",
        )
    return value


def _counted(rows: Rows, row: int, given: Sequence[Any], classes: Sequence[str], how: AnswerFormat) -> list[float]:
    """How often each class is named; empty cells are no vote."""
    counts = [0.0] * len(classes)
    for (_, column), cell in zip(how.columns, given, strict=True):
        votes = cell if isinstance(cell, list | tuple) else [cell]
        if how.kind == "labels" and len(votes) != 1:
            raise DataError(
                f"{rows.place(row)}, column '{column}': {listed([votes])} is a list of labels", "Use --as votes."
            )
        for vote in votes:
            if not _is_empty(vote):
                counts[classes.index(_class_of(rows, row, column, vote, classes, how))] += 1
    return counts


def _class_of(rows: Rows, row: int, column: str, name: Any, classes: Sequence[str], how: AnswerFormat) -> str:
    shown = str(name).lower() if isinstance(name, bool) else str(name)
    if shown in how.names:
        return how.names[shown]
    if shown in classes:
        return shown
    raise DataError(
        f"{rows.place(row)}, column '{column}': '{listed([shown])}' is no class of the cache; it has: "
        f"{listed(classes, quoted=True)}",
        f"Say which class it is: --map '{listed([shown])}={classes[0]}'",
    )


def _joined(
    values: np.ndarray, first: np.ndarray, group: np.ndarray, places: Sequence[tuple[Rows, int]], kind: Kind
) -> np.ndarray:
    """One row per text: the sum of its votes, or its answer, which every row of it must give."""
    if kind == "votes":
        sums = np.zeros((len(first), values.shape[1]))
        np.add.at(sums, group, values)
        return sums
    joined: np.ndarray = values[first]
    other = np.flatnonzero((values != joined[group]).any(axis=1))
    if len(other):
        row = int(other[0])
        here, there = places[row], places[int(first[group[row]])]
        raise DataError(
            f"{here[0].place(here[1])} has the text of {there[0].place(there[1])}, and another answer",
            "Keep one of the two; for several opinions on a text, use --as votes.",
        )
    return joined


def _as_logits(values: np.ndarray, how: AnswerFormat) -> tuple[np.ndarray, int]:
    """Logits float32 whose softmax gives the answers, smoothed; and how many probabilities were below ``FLOOR``."""
    logits: np.ndarray = values.astype(np.float32)
    if how.kind == "logits":
        return logits, 0
    shares = values / values.sum(axis=1, keepdims=True)
    shares = (1 - how.share) * shares + how.share / shares.shape[1]
    logits = np.log(np.maximum(shares, FLOOR)).astype(np.float32)
    return logits, int((shares < FLOOR).sum())
