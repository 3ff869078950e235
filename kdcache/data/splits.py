"""The data of a recipe as arrays: the rows of every split, and each distinct text once.

    Rows (reading.py), batch by batch  ->  texts, labels, groups of a split  ->  ids, labels and texts in arrays

Examples keep duplicates and the order of their file; a text is stored and run once. A seeded hash of text ids selects
validation and transfer texts, so the choice depends neither on row order nor on a library's version. ``DataCounts``
reports irregularities that are no errors: duplicates, conflicting labels, texts that train and test share, transfer
texts that would leak the evaluation.

No object is made for a text, row or id that stays: texts and ids go into arrays as they are read, in memory or in files
(spools.py), and numbers take the place of ids in everything that is counted or compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.ids import id_list, id_words, order_of_words
from kdcache.data.counts import DataCounts
from kdcache.data.labels import (
    NO_LABEL,
    ClassOrder,
    class_order,
    label_cells,
    label_numbers,
    label_warnings,
    refuse_odd_names,
)  # fmt: skip
from kdcache.data.reading import Rows, read_batches, read_rows
from kdcache.data.spools import CodeSpool, Spools, TextSpool
from kdcache.data.texts import column_texts, has_text, ids_of, no_text, seeded_keys
from kdcache.errors import DataError
from kdcache.kept import Kept

if TYPE_CHECKING:
    from kdcache.recipe import DataSection

_TOGETHER = 1 << 16


@dataclass(frozen=True)
class _Split:
    """The rows with text of one split: numbers of rows among all, their lines, labels and groups."""

    source: Rows  # without rows: for messages, and the names of classes in a data set
    numbers: np.ndarray  # int64 [n], or a slice of them
    lines: np.ndarray  # int64 [n]
    labels: np.ndarray  # int32 [n], into ``label_names``
    label_names: list[str | None]
    groups: np.ndarray | None
    group_names: list[str] = field(default_factory=list)
    empty: int = 0

    def take(self, keep: np.ndarray) -> _Split:
        groups = None if self.groups is None else self.groups[keep]
        return _Split(
            self.source, self.numbers[keep], self.lines[keep], self.labels[keep], self.label_names, groups,
            self.group_names,
        )  # fmt: skip

    def first_labels(self) -> tuple[Rows, list[str | None], np.ndarray]:
        """The first row of every label, in their order: places, names, and codes."""
        codes, first = np.unique(self.labels, return_index=True)
        order = np.argsort(first)
        rows = replace(self.source, lines=self.lines[first[order]].tolist())
        return rows, [self.label_names[code] for code in codes[order].tolist()], codes[order]

    def label_numbers(self, order: ClassOrder, column: str, *, scored: bool) -> np.ndarray:
        rows, names, codes = self.first_labels()
        numbers = np.full(len(self.label_names), NO_LABEL, np.int64)
        numbers[codes] = label_numbers(rows, names, order, column, scored=scored)
        found: np.ndarray = numbers[self.labels]
        return found


def sources(section: DataSection) -> list[tuple[str, str]]:
    """Every file or hub data set of a recipe, with its split."""
    named = [(split, getattr(section, split)) for split in ("train", "validation", "test")]
    return [(split, source) for split, source in named if source] + [("transfer", one) for one in section.transfer]


def read_splits(section: DataSection, spools: Spools) -> Kept:
    """Read every file of the section. Raises DataError (exit 2) with file, line and hint.

    Returns:
        The arrays of a ``TextTable`` with all texts, ``ids`` uint8 [t, 16] in the order of their first use; per split
        ``SPLIT.ids`` uint8 [n, 16], ``SPLIT.labels`` int64 [n] and, with a group column, ``SPLIT.groups``. Its document
        has the label names, the counts, and the names of the groups.
    """
    texts = TextSpool(spools, len(section.text))
    splits = {"train": _read_split(section, spools, texts, "train")}
    rows, names, _ = splits["train"].first_labels()
    order = _ordered_classes(section, rows, names)
    if section.validation_fraction:
        splits["train"], splits["validation"] = _split_off(splits["train"], texts.ids(), section)
    there = dict(sources(section))
    for split in ("validation", "test"):
        if split in there:
            splits[split] = _read_split(section, spools, texts, split, order.names)
    labels = {split: own.label_numbers(order, section.label, scored=split != "train") for split, own in splits.items()}
    transfer, no_texts = _read_transfer(section, texts)
    ids = texts.ids()
    numbers, distinct = _numbered(ids)
    used, dropped = _used_transfer(section, splits, transfer, numbers, ids)
    kept = _texts_in_order(splits, used, numbers, ids) | texts.arrays()
    for split, own in splits.items():
        kept |= {f"{split}.ids": _taken(ids, own.numbers), f"{split}.labels": labels[split]}
        kept |= {} if own.groups is None else {f"{split}.groups": own.groups}
    groups: dict[str, Any] = {split: None if own.groups is None else own.group_names for split, own in splits.items()}
    if len(used):
        kept |= {"transfer.ids": ids[used], "transfer.labels": np.full(len(used), NO_LABEL, np.int64)}
        groups["transfer"] = None
    dropped = {"without text": no_texts, **dropped}
    counts = _counts(splits, labels, order, numbers, distinct, len(used), dropped)
    document = {
        "label_names": order.names, "declared": bool(order.declared), "counts": counts.as_dict(), "groups": groups,
    }  # fmt: skip
    return Kept(kept, document)


def _ordered_classes(section: DataSection, rows: Rows, labels: Sequence[str | None]) -> ClassOrder:
    """The classes of the training rows. Raises DataError where these are fewer than two, or cannot be named."""
    order = class_order(rows, labels, section.label, section.labels)
    refuse_odd_names("label", order.names)
    refuse_odd_names("text column", section.text)
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


def _read_split(
    section: DataSection, spools: Spools, texts: TextSpool, split: str, known: Sequence[str] | None = None
) -> _Split:
    wanted = (*section.text, *([section.group] if section.group else []), section.label)
    first, lines, empty, named = texts.rows, spools("<i8"), 0, Rows("", {}, [])
    labels, groups = CodeSpool(spools), CodeSpool(spools)
    for rows in _batches(getattr(section, split), split, wanted, section):
        found = column_texts(rows, section.text)
        keep = [has_text(text) for text in found]
        left_out, named = keep.count(False), replace(rows, columns={}, lines=[])
        if left_out:
            rows, found, empty = rows.take(keep), [text for text in found if has_text(text)], empty + left_out
        if section.group is not None:
            groups.add(["" if one is None else str(one) for one in rows.column(section.group, "group")])
        texts.add(ids_of(rows, found), found)
        of_data_set = rows.class_names.get(section.label, ())
        labels.add(label_cells(rows, section.label, known or section.labels or of_data_set))
        lines.add(list(rows.lines))
    if texts.rows == first:
        raise no_text(named.source, section.text)
    numbers, own = np.arange(first, texts.rows), labels.array()
    return _Split(
        named, numbers, lines.array(), own, list(labels.names),
        groups.array() if section.group is not None else None, list(groups.names), empty,
    )  # fmt: skip


def _batches(source: str, split: str, wanted: Sequence[str], section: DataSection) -> Iterator[Rows]:
    """The rows of a file or of a hub data set; DataError where none has a column of ``wanted``.

    Columns that some JSON lines lack are None there.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        yield read_rows(source, "train" if split == "transfer" else split)
        return
    names: dict[str, None] = {}
    for rows in read_batches(path):
        names |= dict.fromkeys(rows.columns)
        columns = {name: rows.columns.get(name, [None] * len(rows)) for name in wanted}
        if path.suffix.lower() not in (".jsonl", ".ndjson"):
            columns = dict(rows.columns)
        yield replace(rows, columns=columns)
    every = Rows(str(path), dict.fromkeys(names, ()), [])
    for name in wanted:
        every.column(name, "group" if name == section.group else "label" if name == section.label else "text")


def _read_transfer(section: DataSection, texts: TextSpool) -> tuple[np.ndarray, int]:
    """Numbers of the rows of transfer files, and how many more have no text."""
    first, empty = texts.rows, 0
    for source in section.transfer:
        for rows in _batches(source, "transfer", section.text, section):
            found = column_texts(rows, section.text)
            ids = ids_of(rows, found)
            keep = [has_text(text) for text in found]
            empty += keep.count(False)
            some = [(one, text) for one, text, kept in zip(ids, found, keep, strict=True) if kept]
            texts.add([one for one, _ in some], [text for _, text in some])
    return np.arange(first, texts.rows), empty


def _numbered(ids: np.ndarray) -> tuple[np.ndarray, int]:
    """A number for every distinct id, in their order, int32 or int64 [rows]; and how many there are."""
    high, low = id_words(ids)
    order = order_of_words(high, low)
    new = np.ones(len(ids), np.bool_)
    new[1:] = (high[order[1:]] != high[order[:-1]]) | (low[order[1:]] != low[order[:-1]])
    ranks = np.cumsum(new, dtype=order.dtype)
    numbers = np.empty(len(ids), order.dtype)
    numbers[order] = ranks - 1
    return numbers, int(ranks[-1]) if len(ranks) else 0


def _taken(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``ids[rows]``; a view where the rows follow each other."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((rows[1:] > rows[:-1]).all()):
        return ids[int(rows[0]) : int(rows[-1]) + 1]
    taken: np.ndarray = ids[rows]
    return taken


def _split_off(train: _Split, ids: np.ndarray, section: DataSection) -> tuple[_Split, _Split]:
    """Split off validation by text, so that no text is in both; texts with an unlabelled row stay in train."""
    own, _ = _numbered(_taken(ids, train.numbers))
    unlabelled = np.zeros(int(own.max(initial=-1)) + 1, np.bool_)
    none = np.array([name is None for name in train.label_names])
    unlabelled[own[none[train.labels]]] = True
    keys = _keys(_taken(ids, train.numbers), section.seed, "validation")
    chosen = np.array([int(key) < section.validation_fraction * 2**64 for key in keys]) & ~unlabelled[own]
    if not chosen.any() or chosen.all():
        raise _unsplit(section.validation_fraction, train.source.source, len(chosen), int(chosen.sum()))
    return replace(train.take(~chosen), empty=train.empty), train.take(chosen)


def _unsplit(fraction: float, source: str, rows: int, chosen: int) -> DataError:
    """The error for a split that would be empty."""
    return DataError(
        f"data.validation_fraction = {fraction} splits the {rows:,} rows of {source} into "
        f"{rows - chosen:,} for training and {chosen:,} for validation; both need some",
        "Give another data.validation_fraction or data.seed, or a validation file.",
    )


def _keys(ids: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """``seeded_keys``, uint64 [n]."""
    keys = np.empty(len(ids), np.uint64)
    for start in range(0, len(ids), _TOGETHER):
        some = id_list(ids[start : start + _TOGETHER])
        keys[start : start + len(some)] = seeded_keys(some, seed, purpose)
    return keys


def transfer_order(ids: np.ndarray, seed: int) -> np.ndarray:
    """The places of transfer texts in the order in which ``data.transfer_rows`` takes them; ``ids`` uint8 [n, 16]."""
    high, low = id_words(ids)
    return np.lexsort((low, high, _keys(ids, seed, "transfer")))


def _used_transfer(
    section: DataSection, splits: Mapping[str, _Split], rows: np.ndarray, numbers: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """The rows of the used transfer texts in seeded order, and the number of dropped ones by reason."""
    count = int(numbers.max(initial=-1)) + 1
    evaluation, train = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    for split, own in splits.items():
        (train if split == "train" else evaluation)[numbers[own.numbers]] = True
    of_rows = numbers[rows]
    in_evaluation = evaluation[of_rows]
    in_train = train[of_rows] & ~in_evaluation
    left = rows[~(in_evaluation | in_train)]
    _, first = np.unique(numbers[left], return_index=True)
    new = left[np.sort(first)]
    used = new[transfer_order(ids[new], section.seed)[: section.transfer_rows]]
    return used, {
        "found in validation or test": int(in_evaluation.sum()),
        "already in train": int(in_train.sum()),
        "duplicates": len(left) - len(new),
        "beyond transfer_rows": len(new) - len(used),
    }


def _texts_in_order(
    splits: Mapping[str, _Split], transfer: np.ndarray, numbers: np.ndarray, ids: np.ndarray
) -> dict[str, np.ndarray]:
    """The ids of all used texts in the order of their first use, and the arrays of a ``TextTable`` that find them."""
    sequence = np.concatenate([*(own.numbers for own in splits.values()), transfer])
    _, first = np.unique(numbers[sequence], return_index=True)
    rows = sequence[np.sort(first)]
    used = ids[rows]
    high, low = id_words(used)
    order = order_of_words(high, low)
    place = rows[order].astype(np.min_scalar_type(max(int(rows.max(initial=0)), 1 << 16)))
    return {"ids": used, "high": high[order], "low": low[order], "place": place}


def _counts(
    splits: Mapping[str, _Split],
    labels: Mapping[str, np.ndarray],
    order: ClassOrder,
    numbers: np.ndarray,
    distinct: int,
    transfer: int,
    dropped: Mapping[str, int],
) -> DataCounts:
    """Counts over the labelled splits and the transfer texts, without zeros; texts by their numbers."""

    def there(rows: np.ndarray) -> np.ndarray:
        found = np.zeros(distinct, np.bool_)
        found[numbers[rows]] = True
        return found

    def conflicts(split: str) -> int:
        known = labels[split] >= 0
        of_text, own = numbers[splits[split].numbers[known]], labels[split][known]
        least, most = np.full(distinct, len(order.names)), np.full(distinct, -1)
        np.minimum.at(least, of_text, own)
        np.maximum.at(most, of_text, own)
        return int((most > least).sum())

    def of_labels(split: str) -> dict[str, int]:
        counts = np.bincount(labels[split][labels[split] >= 0], minlength=len(order.names)).tolist()
        return dict(zip(order.names, counts, strict=True))

    def nonzero(count: Callable[[str], int]) -> dict[str, int]:
        return {split: number for split in splits if (number := int(count(split)))}

    texts = {split: there(own.numbers) for split, own in splits.items()}
    shared = {f"{a} and {b}": int((texts[a] & texts[b]).sum()) for a, b in combinations(splits, 2)}
    rows = {split: len(own.numbers) for split, own in splits.items()}
    return DataCounts(
        rows=rows | ({"transfer": transfer} if transfer else {}),
        unlabelled=nonzero(lambda split: int((labels[split] < 0).sum())),
        labels={split: of_labels(split) for split in splits},
        duplicates=nonzero(lambda split: rows[split] - int(texts[split].sum())),
        conflicts=nonzero(conflicts),
        shared={names: number for names, number in shared.items() if number},
        transfer_dropped={reason: number for reason, number in dropped.items() if number},
        empty=nonzero(lambda split: splits[split].empty),
        warnings=label_warnings(order, labels["train"]),
    )
