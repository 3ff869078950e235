"""A task: the examples of every split, and each distinct text once under an id that depends only on the text.

    Rows (reading.py)  ->  texts, labels, groups of a split  ->  Examples by text id + texts  ->  TaskData

Examples keep duplicates and the order of their file; a text is stored and run once. A seeded hash of text ids selects
validation and transfer texts, so the choice depends neither on row order nor on a library's version. ``DataCounts``
reports irregularities that are no errors: duplicates, conflicting labels, texts that train and test share, transfer
texts that would leak the evaluation.

Rows of train may lack a label (an empty cell, or null): they get label -1 and are distilled like transfer texts. Rows
of validation and test need one, because they are scored. A row without any text is skipped and counted. A pair with one
empty column is a valid text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.buckets import NoRoomError
from kdcache.cache.ids import Examples, id_array, text_id
from kdcache.data.counts import DataCounts, count_rows
from kdcache.data.labels import NO_LABEL, ClassOrder, class_order, label_cells, label_numbers, label_warnings
from kdcache.data.reading import Rows, read_rows
from kdcache.errors import DataError

if TYPE_CHECKING:
    from kdcache.data.reading import Rows
    from kdcache.recipe import DataSection


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The data of a recipe, read and checked."""

    texts: Mapping[bytes, tuple[str, ...]]  # each distinct text by its id, in order of first use
    splits: dict[str, Examples]  # those of 'train', 'validation', 'test', 'transfer' that exist
    label_names: tuple[str, ...]  # in class order
    text_columns: tuple[str, ...]
    counts: DataCounts
    labels_declared: bool = False  # by data.labels or by the data set; else sorted


@dataclass(frozen=True)
class LabelledTexts:
    """The rows of one file in its order, for ``evaluate``."""

    texts: tuple[tuple[str, ...], ...]
    text_ids: np.ndarray  # uint8[n, 16]
    labels: np.ndarray  # int64[n], -1 = none
    label_names: tuple[str, ...]
    empty: int = 0  # skipped rows without text


@dataclass(frozen=True)
class _Split:
    rows: Rows
    texts: list[tuple[str, ...]]
    ids: list[bytes]
    labels: list[str | None]
    groups: tuple[str, ...] | None
    empty: int = 0  # skipped rows without text

    def take(self, keep: Sequence[bool]) -> _Split:
        """The rows where ``keep`` is true."""
        return replace(
            self,
            rows=replace(self.rows, columns={}).take(keep),
            texts=list(compress(self.texts, keep)),
            ids=list(compress(self.ids, keep)),
            labels=list(compress(self.labels, keep)),
            groups=None if self.groups is None else tuple(compress(self.groups, keep)),
        )


def load_task(section: DataSection) -> TaskData:
    """Read every file of the section. Raises DataError (exit 2) with file, line and hint.

    Hundreds of megabytes of data files are read into mapped arrays, which are kept (large.py).
    """
    from kdcache.data.large import is_large, load_large_task

    if is_large(section):
        try:
            return load_large_task(section)
        except NoRoomError as error:
            log.warning("the data are read into memory, about 0.6 KB of a row: %s", error)
    splits = {"train": _read_split(section, section.train, "train")}
    order = ordered_classes(section, splits["train"].rows, splits["train"].labels)
    names = order.names
    if section.validation_fraction:
        splits["train"], splits["validation"] = _split_off(splits["train"], section.validation_fraction, section.seed)
    elif section.validation is not None:
        splits["validation"] = _read_split(section, section.validation, "validation", names)
    if section.test is not None:
        splits["test"] = _read_split(section, section.test, "test", names)
    examples = {name: _examples(name, split, order, section.label) for name, split in splits.items()}
    texts = {identity: text for split in splits.values() for identity, text in zip(split.ids, split.texts, strict=True)}
    transfer, dropped = _transfer(section, splits)
    if transfer:
        texts |= transfer
        examples["transfer"] = Examples(id_array(transfer), np.full(len(transfer), NO_LABEL, dtype=np.int64), None)
    ids = {name: split.ids for name, split in splits.items()}
    labels = {name: examples[name].labels for name in splits}
    empty = {name: split.empty for name, split in splits.items()}
    warnings = label_warnings(order, labels["train"])
    counts = count_rows(ids, labels, names, transfer=len(transfer), dropped=dropped, empty=empty, warnings=warnings)
    return TaskData(texts, examples, names, tuple(section.text), counts, labels_declared=bool(order.declared))


def read_examples(
    source: str,
    text: Sequence[str],
    label: str | None,
    label_names: Sequence[str] | None = None,
    *,
    labels_declared: bool = True,
    numbered_as: Sequence[str] | None = None,
) -> LabelledTexts:
    """The rows with text of one file or hub data set, in order; all labels are -1 if ``label`` is None.

    ``label_names`` is the class order; None sorts the labels. Integers are class numbers in ``numbered_as`` if given,
    else in ``label_names`` if that order was declared (``labels_declared``). Raises DataError as ``load_task``, and,
    if a label column is named, for rows without a label, which cannot be scored.
    """
    rows, texts, empty = rows_with_text(read_rows(source, "test"), text)
    ids = ids_of(rows, texts)
    labels = np.full(len(texts), NO_LABEL, dtype=np.int64)
    names = tuple(label_names or ())
    if label is not None:
        cells = label_cells(rows, label, names or rows.class_names.get(label, ()))
        if numbered_as is not None:
            by_number = {str(number): name for number, name in enumerate(numbered_as)}
            cells = [cell if cell is None or cell in names else by_number.get(cell, cell) for cell in cells]
        of_model = ClassOrder(names, "training" if labels_declared else "", "the training data of the model")
        order = of_model if names else class_order(rows, cells, label)
        labels, names = label_numbers(rows, cells, order, label, scored=True), order.names
    return LabelledTexts(tuple(texts), id_array(ids), labels, names, empty)


def _read_split(section: DataSection, source: str, split: str, known: Sequence[str] | None = None) -> _Split:
    rows, texts, empty = rows_with_text(read_rows(source, split), section.text)
    groups = None
    if section.group is not None:
        groups = tuple("" if value is None else str(value) for value in rows.column(section.group, "group"))
    known = known or section.labels or rows.class_names.get(section.label, ())
    return _Split(rows, texts, ids_of(rows, texts), label_cells(rows, section.label, known), groups, empty)


def ordered_classes(section: DataSection, rows: Rows, labels: Sequence[str | None]) -> ClassOrder:
    """The classes of the training rows. Raises DataError where these are fewer than two."""
    order = class_order(rows, labels, section.label, section.labels)
    if all(label is None for label in labels):
        raise DataError(
            f"{rows.source} has no label in its column '{section.label}'; training needs labelled rows",
            "Texts without labels belong in data.transfer.",
        )
    if len(order.names) < 2:
        raise DataError(
            f"{rows.source} has only the label '{order.names[0]}'; a classifier needs two or more",
            "Check data.label, or name all classes with data.labels.",
        )
    return order


def _examples(name: str, split: _Split, order: ClassOrder, column: str) -> Examples:
    labels = label_numbers(split.rows, split.labels, order, column, scored=name != "train")
    return Examples(id_array(split.ids), labels, split.groups)


def _split_off(train: _Split, fraction: float, seed: int) -> tuple[_Split, _Split]:
    """Split off validation by text, so that no text is in both; texts with an unlabelled row stay in train."""
    unlabelled = {identity for identity, label in zip(train.ids, train.labels, strict=True) if label is None}
    keys = seeded_keys(train.ids, seed, "validation")
    chosen = [
        key < fraction * 2**64 and identity not in unlabelled for identity, key in zip(train.ids, keys, strict=True)
    ]
    rest = [not side for side in chosen]
    if not any(chosen) or not any(rest):
        raise unsplit(fraction, train.rows.source, len(chosen), sum(chosen))
    return train.take(rest), replace(train.take(chosen), empty=0)


def unsplit(fraction: float, source: str, rows: int, chosen: int) -> DataError:
    """The error for a split that would be empty."""
    return DataError(
        f"data.validation_fraction = {fraction} splits the {rows:,} rows of {source} into "
        f"{rows - chosen:,} for training and {chosen:,} for validation; both need some",
        "Give another data.validation_fraction or data.seed, or a validation file.",
    )


def _transfer(section: DataSection, splits: dict[str, _Split]) -> tuple[dict[bytes, tuple[str, ...]], dict[str, int]]:
    """The used transfer texts in seeded order, and the number of dropped rows by reason."""
    evaluation = {identity for name, split in splits.items() if name != "train" for identity in split.ids}
    train = set(splits["train"].ids)
    texts_by_id: dict[bytes, tuple[str, ...]] = {}
    dropped = {
        "without text": 0,
        "found in validation or test": 0,
        "already in train": 0,
        "duplicates": 0,
        "beyond transfer_rows": 0,
    }
    for source in section.transfer:
        rows = read_rows(source, "train")
        texts = column_texts(rows, section.text)
        for identity, text in zip(ids_of(rows, texts), texts, strict=True):
            if not has_text(text):
                dropped["without text"] += 1
            elif identity in evaluation:
                dropped["found in validation or test"] += 1
            elif identity in train:
                dropped["already in train"] += 1
            elif identity in texts_by_id:
                dropped["duplicates"] += 1
            else:
                texts_by_id[identity] = text
    keys = seeded_keys(list(texts_by_id), section.seed, "transfer")
    order = [identity for _, identity in sorted(zip(keys, texts_by_id, strict=True))]
    used = order[: section.transfer_rows]
    dropped["beyond transfer_rows"] = len(order) - len(used)
    return {identity: texts_by_id[identity] for identity in used}, dropped


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
