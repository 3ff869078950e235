"""The examples and texts that a student is trained and scored on, and how they join a cache.

They come from the recipe's data files, so corrected labels need no new dump. Without the files (a cache that a
colleague made) the cache's own examples are used. Either way rows join their targets by text id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache import buckets
from kdcache.cache.ids import Examples, id_list, match
from kdcache.cache.spec import check_same_task
from kdcache.cache.text_table import look_up
from kdcache.data.splits import transfer_order
from kdcache.data.task import load_task
from kdcache.errors import DataError, MismatchError
from kdcache.loading.examples import TRANSFER
from kdcache.loading.order import blocks
from kdcache.runs import home

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.recipe import DataSection


@dataclass(frozen=True, eq=False)
class StudentData:
    """``texts`` by id, and the examples of each split: train, validation, test and transfer, as far as they exist."""

    texts: Mapping[bytes, tuple[str, ...]]
    splits: Mapping[str, Examples]
    label_names: tuple[str, ...]
    text_columns: tuple[str, ...]
    origin: str  # "recipe" or "cache"
    labels_declared: bool = True  # False: the class order is that of the sorted names
    empty_rows: Mapping[str, int] = field(default_factory=dict)  # per split, rows without text, which are left out
    notes: tuple[str, ...] = ()  # warnings about the data

    def examples(self, split: str) -> Examples:
        """The rows of ``split``, as ``Cache.examples`` gives those of a cache. MismatchError where there is none."""
        if split not in self.splits:
            raise MismatchError(
                f"the data has no split '{split}'; it has: {', '.join(self.splits)}", "Name its file in [data]."
            )
        return self.splits[split]

    def texts_of(self, split: str) -> list[tuple[str, ...]]:
        """The text of every example of ``split``, in its order."""
        ids = self.splits[split].text_ids
        found = [text for some in blocks(len(ids)) for text in look_up(self.texts, id_list(ids[some]))]
        texts = [text for text in found if text is not None]
        if len(texts) < len(found):
            raise KeyError(ids[found.index(None)].tobytes())
        return texts

    def digest(self) -> str:
        """sha256 over ids and labels of every split; a resumed training must have the same."""
        digest = hashlib.sha256()
        for name in sorted(self.splits):
            split = self.splits[name]
            digest.update(name.encode())
            for array in (split.text_ids, split.labels.astype(np.int64, copy=False)):
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def with_rows(data: StudentData, rows: str | None) -> StudentData:
    """``data`` with the rows to learn from: all (None), ``train`` without transfer texts, or the ``labelled`` ones."""
    if rows is None:
        return data
    splits = {name: split for name, split in data.splits.items() if name != TRANSFER}
    if rows == "labelled":
        train = splits["train"]
        keep = train.labels >= 0
        groups = None if train.groups is None else tuple(compress(train.groups, keep.tolist()))
        splits["train"] = Examples(train.text_ids[keep], train.labels[keep], groups)
    return replace(data, splits=splits)


def student_data(section: DataSection, cache: Cache | None) -> StudentData:
    """The recipe's data, or the cache's own where the recipe's training file does not exist.

    Of the cache's transfer texts those are taken that the recipe asks for.

    Raises DataError for unusable files, and for missing files without a cache that has texts; MismatchError where
    labels or text columns are not those of the cache.
    """
    try:
        task = load_task(section)
    except DataError as error:
        if cache is None or Path(section.train).exists():
            raise
        if not cache.has_text:
            raise DataError(
                f"cache '{cache.path}' came without its texts, and the data files are missing too: {error.message}",
                "Name the data that the cache was made from in [data]: rows join by their text.",
            ) from error
        return _data_of(cache, section)
    empty = task.counts.empty
    notes = tuple(task.counts.notes())
    data = StudentData(
        task.texts, dict(task.splits), task.label_names, task.text_columns, "recipe", task.labels_declared, empty, notes
    )
    if cache is not None:
        cure = "Set data.labels and data.text to those of the cache, or dump the teachers of this task."
        check_same_task(data, cache.task, ("the data", f"cache '{cache.path}'"), cure, same_column_names=False)
    return data


def _data_of(cache: Cache, section: DataSection) -> StudentData:
    texts = {
        identity: text
        for part in cache.parts
        for identity, text in zip(id_list(cache.text_ids(part.name)), cache.texts(part.name), strict=True)
    }
    splits = {name: cache.examples(name) for name in cache.splits}
    notes = [f"there is no file '{section.train}': the rows are those of cache '{cache.path}'"]
    if TRANSFER in splits and not section.transfer:
        notes.append(f"data.transfer is empty: the cache's {len(splits.pop(TRANSFER)):,} transfer texts are left out")
    elif TRANSFER in splits and len(splits[TRANSFER]) > (section.transfer_rows or len(splits[TRANSFER])):
        kept = splits[TRANSFER]
        first = transfer_order(kept.text_ids[:], section.seed)[: section.transfer_rows]
        splits[TRANSFER] = Examples(kept.text_ids[first], kept.labels[first], None)
    names = tuple(cache.task.label_names)
    declared = names != tuple(sorted(names))  # a sorted order may be declared too; that is not stored
    columns = tuple(cache.task.text_columns)
    return StudentData(texts, splits, names, columns, "cache", declared, notes=tuple(notes))


@dataclass(frozen=True)
class SplitJoin:
    """How a split of the data joins the cache.

    ``missing``: rows of the data whose text the cache lacks. ``extra``: texts of the cache that the data lack.
    """

    split: str
    rows: int
    missing: int
    extra: int
    first_missing: str = ""  # text id, and the beginning of the text
    first_extra: str = ""  # text id

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without empty values."""
        return {name: value for name, value in vars(self).items() if name != "split" and value != ""}

    def lines(self) -> list[str]:
        """Lines for the user; none where everything joins."""
        lines = []
        if self.missing:
            lines.append(
                f"{self.split}: {self.missing:,} of {self.rows:,} rows have a text that the cache lacks; the first: "
                f"{self.first_missing}"
            )
        if self.extra:
            lines.append(
                f"{self.split}: {self.extra:,} texts of the cache are not in the data and are not used; the first: "
                f"{self.first_extra}"
            )
        return lines


def join_counts(data: StudentData, cache: Cache | None) -> tuple[SplitJoin, ...]:
    """How each split of the recipe's data joins the cache; empty where the data are the cache's own."""
    if cache is None or data.origin != "recipe":
        return ()
    return tuple(_join(data, cache, split) for split in data.splits)


def _join(data: StudentData, cache: Cache, split: str) -> SplitJoin:
    ids = np.asarray(data.splits[split].text_ids)
    if len(ids) > buckets.LARGE and _own_ids(cache, split, ids):
        return SplitJoin(split, len(ids), 0, 0)  # a cache has the texts of its examples
    missing = np.flatnonzero(cache.locate(ids)[0] < 0)
    extra = _extra(ids, cache, split) if split in cache.splits else ids[:0]
    first = ""
    if len(missing):
        text_id = ids[missing[0]].tobytes()
        first = f"{text_id.hex()} {' | '.join(data.texts[text_id])[:60]!r}"
    return SplitJoin(split, len(ids), len(missing), len(extra), first, extra[0].tobytes().hex() if len(extra) else "")


def _own_ids(cache: Cache, split: str, ids: np.ndarray) -> bool:
    """Whether ``ids`` are those of the cache's own examples, in their order."""
    if split not in cache.splits or cache.example_count(split) != len(ids):
        return False
    first = 0
    for own in cache.example_ids(split):
        if not np.array_equal(own, ids[first : first + len(own)]):
            return False
        first += len(own)
    return True


def _extra(ids: np.ndarray, cache: Cache, split: str) -> np.ndarray:
    """The distinct ids of the cache's ``split`` that are not in ``ids``, in their order."""
    lacking = np.ones(cache.example_count(split), np.bool_)

    def take(asked: np.ndarray, _: np.ndarray) -> None:
        lacking[asked] = False

    if len(ids) <= buckets.LARGE:
        match(ids, cache.example_ids(split), take)
    else:
        known = buckets.numbered(ids[some] for some in blocks(len(ids)))
        stored = buckets.numbered(cache.example_ids(split))
        try:
            buckets.match_in_buckets(known, stored, len(ids), home() / "joins", take)
        except buckets.NoRoomError:
            match(ids, cache.example_ids(split), take)
    found, first = [ids[:0]], 0
    for own in cache.example_ids(split):
        found.append(own[lacking[first : first + len(own)]])
        first += len(own)
    return np.unique(np.concatenate(found), axis=0)
