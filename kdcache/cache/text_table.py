"""Texts by id in arrays, which may be mapped: a dict of millions of texts needs 0.6 KB of each.

The columns lie one after the other as UTF-8, as Arrow's large strings do. Sorted ids say which row is a text's. A view
has some of the texts, and shares the arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import numpy as np

from kdcache.cache.ids import id_array, id_list, id_words

_TOGETHER = 1 << 16
Text = tuple[str, ...]


class TextTable(Mapping[bytes, Text]):
    """A mapping from text id to its columns, in the order of ``ids``.

    Args:
        arrays: ``high`` and ``low`` uint64 [t], the two words of the sorted ids; ``place`` [t], the row of each;
            for each column c ``offsets.c`` int64 [rows + 1] and ``values.c`` uint8.
        ids: uint8 [n, 16], distinct, all among the sorted ones.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], ids: np.ndarray) -> None:
        self._arrays, self.ids = arrays, ids
        self._columns = sum(name.startswith("offsets.") for name in arrays)

    def view(self, ids: np.ndarray) -> TextTable:
        """The texts of ``ids`` uint8 [n, 16], distinct ids of this table."""
        return TextTable(self._arrays, ids)

    def __or__(self, other: TextTable) -> TextTable:
        """The texts of two views of the same arrays that have no text in common."""
        return self.view(np.concatenate([self.ids, other.ids]))

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self.ids), _TOGETHER):
            yield from id_list(self.ids[start : start + _TOGETHER])

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and bool(self._has(self.numbers(id_array([key])))[0])

    def __getitem__(self, key: bytes) -> Text:
        (text,) = self.lookup(id_array([key]))
        if text is None:
            raise KeyError(key)
        return text

    def texts(self) -> TextList:
        """The texts alone, in their order."""
        return TextList(self)

    def pairs(self) -> Iterator[tuple[bytes, Text]]:
        """``items()``, many at a time."""
        return zip(self, self.texts(), strict=True)

    def lookup(self, ids: np.ndarray) -> list[Text | None]:
        """The texts of ``ids`` uint8 [m, 16]; None where there is none."""
        numbers = self.numbers(ids)
        there = self._has(numbers)
        places = self._arrays["place"][numbers[there]].astype(np.int64)
        columns = []
        for column in range(self._columns):
            offsets, values = self._arrays[f"offsets.{column}"], self._arrays[f"values.{column}"]
            edges = zip(offsets[places].tolist(), offsets[places + 1].tolist(), strict=True)
            columns.append([str(values[start:end].data, "utf-8") for start, end in edges])
        found = iter(zip(*columns, strict=True))
        return [next(found) if one else None for one in there.tolist()]

    def numbers(self, ids: np.ndarray) -> np.ndarray:
        """The place of each of ``ids`` uint8 [m, 16] among the sorted ids, int64 [m]; -1 where it is none of them."""
        highs, lows = self._arrays["high"], self._arrays["low"]
        high, low = id_words(ids)
        place, found = np.searchsorted(highs, high), np.full(len(ids), -1, np.int64)
        open_ = np.arange(len(ids))
        while len(open_):
            open_ = open_[place[open_] < len(highs)]
            open_ = open_[highs[place[open_]] == high[open_]]
            same = lows[place[open_]] == low[open_]
            found[open_[same]] = place[open_[same]]
            open_ = open_[~same]
            place[open_] += 1
        return found

    def _has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of these numbers are of texts of this view, bool [m]."""
        if len(self.ids) == len(self._arrays["high"]):
            return numbers >= 0
        members = self._members
        place = np.minimum(np.searchsorted(members, numbers), max(len(members) - 1, 0))
        return (numbers >= 0) & (members[place] == numbers) if len(members) else np.zeros(len(numbers), np.bool_)

    @functools.cached_property
    def _members(self) -> np.ndarray:
        """The numbers of the texts of this view, sorted."""
        blocks = range(0, len(self.ids), _TOGETHER)
        numbers = [self.numbers(self.ids[start : start + _TOGETHER]).astype(np.int32) for start in blocks]
        return np.sort(np.concatenate([np.zeros(0, np.int32), *numbers]))


class TextList(Sequence[Text]):
    """The texts of a table; they are made when they are asked for."""

    def __init__(self, table: TextTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, which: int) -> Text: ...
    @overload
    def __getitem__(self, which: slice) -> list[Text]: ...
    def __getitem__(self, which: int | slice) -> Text | list[Text]:
        if isinstance(which, slice):
            return [text for text in self._table.lookup(self._table.ids[which]) if text is not None]
        return self._table[bytes(self._table.ids[which])]

    def __iter__(self) -> Iterator[Text]:
        for start in range(0, len(self), _TOGETHER):
            yield from self[start : start + _TOGETHER]


def list_of(texts: Mapping[bytes, Text]) -> Sequence[Text]:
    """The texts alone, in their order."""
    return texts.texts() if isinstance(texts, TextTable) else list(texts.values())


def ids_of_texts(texts: Mapping[bytes, Text]) -> np.ndarray:
    """The ids of texts in their order, uint8 [n, 16]."""
    return texts.ids if isinstance(texts, TextTable) else id_array(texts)


def look_up(texts: Mapping[bytes, Text], ids: Sequence[bytes]) -> list[Text | None]:
    """The texts of ``ids``; None where there is none."""
    return texts.lookup(id_array(ids)) if isinstance(texts, TextTable) else [texts.get(one) for one in ids]
