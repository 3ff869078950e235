"""Where the texts of a cache lie: part and row of a text, by its id.

How ids are searched depends on the number of texts: an index that stays in memory, a sort for one search, which needs
24 bytes of a text, or buckets in temporary files.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache import buckets
from kdcache.cache.ids import ID_BYTES, IdIndex, match
from kdcache.runs import home

if TYPE_CHECKING:
    from kdcache.cache.contents import PartInfo

_KEPT = 1 << 18  # texts up to which an index of their ids stays in memory (5 MB); more are sorted for each search
_BLOCK = 1 << 18  # ids that are read together
Found = tuple[np.ndarray, np.ndarray]  # index of the part and row in it, int32 [m], -1: the cache lacks the text

log = logging.getLogger(__name__)


def _nowhere(count: int) -> Found:
    return np.full(count, -1, np.int32), np.full(count, -1, np.int32)


class TextPlaces:
    """``text_ids`` reads the ids of a part. Thread-safe."""

    def __init__(self, parts: Sequence[PartInfo], text_ids: Callable[[str], np.ndarray]) -> None:
        self._parts, self._text_ids = parts, text_ids
        self._index: IdIndex | None = None
        self._index_lock = threading.Lock()

    def locate(self, ids: np.ndarray) -> Found:
        """The places of ``ids`` uint8 [m, 16]; a text that is in several parts is found in the first full one."""
        starts = range(0, len(ids), _BLOCK)
        return self.locate_blocks(lambda: (ids[start : start + _BLOCK] for start in starts), len(ids))

    def locate_blocks(self, blocks: Callable[[], Iterable[np.ndarray]], count: int) -> Found:
        """``locate`` of ``count`` ids that come block by block."""
        if self._texts > buckets.LARGE:
            try:
                return self._in_buckets(blocks(), count)
            except buckets.NoRoomError as error:
                log.warning("ids are joined in memory, 24 bytes of a row, for lack of temporary files: %s", error)
        return self._in_memory(blocks(), count)

    def _in_buckets(self, blocks: Iterable[np.ndarray], count: int) -> Found:
        parts, rows = _nowhere(count)

        def take(asked: np.ndarray, found: np.ndarray) -> None:
            parts[asked] = found >> 32
            rows[asked] = found & 0xFFFFFFFF

        larger, place = max(count, self._texts), home() / "joins"
        buckets.match_in_buckets(self._places(), buckets.numbered(blocks), larger, place, take)
        return parts, rows

    def _in_memory(self, blocks: Iterable[np.ndarray], count: int) -> Found:
        order, bounds = self._in_order()
        parts, rows = _nowhere(count)
        numbers = np.arange(len(order), dtype=np.min_scalar_type(len(order)))
        place_of = np.repeat(numbers, np.diff(bounds))  # of every text: the place of its part in ``order``

        def take(asked: np.ndarray, found: np.ndarray) -> None:
            places = place_of[found]
            parts[asked] = order[places]
            rows[asked] = found - bounds[places]

        if bounds[-1] > _KEPT:
            match(self._all_ids(order, bounds), blocks, take)
        else:
            index = self._kept_index(order, bounds)
            for ids, asked in buckets.numbered(blocks):
                found = index.find(ids)
                there = np.flatnonzero(found >= 0)
                take(asked[there], found[there])
        return parts, rows

    @property
    def _texts(self) -> int:
        return sum(part.texts for part in self._parts)

    def _places(self) -> buckets.Blocks:
        """The ids of all texts, full parts first, and where each lies: the part in the upper half of the number."""
        ids, places, rows = [], [], 0
        order, _ = self._in_order()
        for place, number in enumerate(order.tolist()):
            part = self._parts[number]
            ids.append(self._text_ids(part.name))
            places.append((number << 32) + np.arange(part.texts))
            rows += part.texts
            if rows >= _BLOCK or place == len(order) - 1:
                yield np.concatenate(ids), np.concatenate(places)
                ids, places, rows = [], [], 0

    def _in_order(self) -> tuple[np.ndarray, np.ndarray]:
        """The parts with full ones first; the first position of each among all texts, and their number."""
        order = sorted(range(len(self._parts)), key=lambda index: self._parts[index].scope != "full")
        return np.array(order, np.int64), np.cumsum([0, *(self._parts[index].texts for index in order)])

    def _kept_index(self, order: np.ndarray, bounds: np.ndarray) -> IdIndex:
        """The index of all ids, made at its first use."""
        with self._index_lock:
            if self._index is None:
                self._index = IdIndex(self._all_ids(order, bounds))
            return self._index

    def _all_ids(self, order: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """The ids of all parts in ``order``, uint8[n, 16]."""
        ids = np.empty((int(bounds[-1]), ID_BYTES), np.uint8)
        for place, index in enumerate(order.tolist()):
            ids[bounds[place] : bounds[place + 1]] = self._text_ids(self._parts[index].name)
        return ids
