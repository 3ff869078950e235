"""Text ids: a hash of exactly the text columns that the tokenizers get.

A position in a file does not identify a text: caches that align targets by position break when the data change. An id
depends only on the text. So examples, targets and students are joined by id on every machine.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from kdcache.errors import DataError

ID_BYTES = 16


@dataclass(frozen=True)
class Examples:
    """The rows of a split, in the order of its data. Many may share a text."""

    text_ids: np.ndarray  # uint8[n, 16]
    labels: np.ndarray  # int64[n], -1 = no label
    groups: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.labels)


def text_id(columns: Sequence[str]) -> bytes:
    """The 16-byte id of a text: BLAKE2b-128 over its columns in UTF-8, each after its length in bytes.

    The length (uint64, little-endian) keeps ``("ab", "c")`` and ``("a", "bc")`` apart. Raises DataError if a column has
    half of a surrogate pair, which has no UTF-8 form.
    """
    digest = hashlib.blake2b(digest_size=ID_BYTES)
    for column in columns:
        try:
            data = column.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"text {column[:40]!r} is not valid Unicode: {error.reason}", "Repair the text's encoding."
            ) from error
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def id_array(ids: Iterable[bytes]) -> np.ndarray:
    """Ids as ``uint8[n, 16]``."""
    joined = b"".join(ids)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, ID_BYTES)


def id_list(ids: np.ndarray) -> list[bytes]:
    """``uint8[n, 16]`` as a list of 16-byte ids."""
    data = np.ascontiguousarray(ids, dtype=np.uint8).tobytes()
    return [data[start : start + ID_BYTES] for start in range(0, len(data), ID_BYTES)]


def seeded_order(ids: Iterable[bytes], seed: int) -> list[bytes]:
    """The order of texts in a cache: by BLAKE2b-128 of the id, keyed with the seed (int64, little-endian).

    It depends only on the set of ids and the seed: not on the order of files, nor on a library's random numbers.
    """
    key = seed.to_bytes(8, "little", signed=True)
    return sorted(ids, key=lambda id_: (hashlib.blake2b(id_, digest_size=ID_BYTES, key=key).digest(), id_))


def seeded_rows(ids: np.ndarray, seed: int) -> np.ndarray:
    """The rows of distinct ``ids`` uint8[n, 16] in the order of ``seeded_order``, without an object for each."""
    key = seed.to_bytes(8, "little", signed=True)
    digests = np.empty((len(ids), ID_BYTES), np.uint8)
    for start in range(0, len(ids), _TOGETHER):
        some = id_list(ids[start : start + _TOGETHER])
        digests[start : start + len(some)] = id_array(
            hashlib.blake2b(one, digest_size=ID_BYTES, key=key).digest() for one in some
        )
    return order_of_words(*id_words(digests))


def ids_digest(parts: Iterable[np.ndarray]) -> str:
    """The fingerprint of a set of texts: sha256 (hex) over the sorted distinct ids, however they are cut into parts."""
    ids = np.concatenate([np.zeros((0, ID_BYTES), np.uint8), *parts])
    ids = gather_ids(ids, order_of_words(*id_words(ids)))  # np.unique takes ten times as long
    new = np.ones(len(ids), np.bool_)
    new[1:] = (ids[1:] != ids[:-1]).any(axis=1)
    return hashlib.sha256(ids[new].data).hexdigest()


def gather_ids(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``ids[rows]`` of ids uint8[n, 16], in a sixth of the time."""
    gathered: np.ndarray = _values(ids)[rows].view(np.uint8).reshape(-1, ID_BYTES)
    return gathered


class IdIndex:
    """Finds many rows by id: ids are sorted once as pairs of 64-bit words, then searched. Needs 22 bytes per row.

    Ids are hashes, so the first bits of a word say nearly where it lies: a table of these bits leaves a few candidates.
    For ids that are not hashes, a search takes a step more whenever the candidates of an entry double.
    """

    def __init__(self, ids: np.ndarray) -> None:
        high, low = id_words(ids)
        self._order = order_of_words(high, low)
        self._high, self._low = high[self._order], low[self._order]
        bits = min(max(1, len(ids).bit_length() - 2), 32)
        self._shift = np.uint64(64 - bits)
        counts = np.bincount((self._high >> self._shift).astype(np.int64), minlength=1 << bits)
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(self._order.dtype)

    def __len__(self) -> int:
        return len(self._order)

    def find(self, query: np.ndarray) -> np.ndarray:
        """The row of each id of ``query`` (``uint8[m, 16]``) as ``int64[m]``; -1 if it is absent."""
        rows = np.full(len(query), -1, dtype=np.int64)

        def some(first: int) -> None:
            rows[first : first + _TOGETHER] = self._find(*id_words(query[first : first + _TOGETHER]))

        blocks = range(0, len(query) if len(self) else 0, _TOGETHER)
        if len(blocks) < _SEARCHERS:
            list(map(some, blocks))
        else:
            with ThreadPoolExecutor(_SEARCHERS, "kdcache-ids") as pool:
                list(pool.map(some, blocks))
        return rows

    def _find(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        entry = (high >> self._shift).astype(np.int64)
        place = self._starts[entry]  # of the first id that is not smaller
        open_ = np.flatnonzero(place < self._starts[entry + 1])
        first, end = place[open_], self._starts[entry[open_] + 1]
        while len(open_):
            middle = first + (end - first) // 2
            smaller = self._high[middle] < high[open_]
            same = np.flatnonzero(self._high[middle] == high[open_])
            smaller[same] = self._low[middle[same]] < low[open_[same]]
            first, end = np.where(smaller, middle + 1, first), np.where(smaller, end, middle)
            place[open_], going = first, first < end
            open_, first, end = open_[going], first[going], end[going]
        here = np.minimum(place, len(self._order) - 1)
        return np.where((self._high[here] == high) & (self._low[here] == low), self._order[here], -1)


Take = Callable[[np.ndarray, np.ndarray], None]


def match(ids: np.ndarray, query: Iterable[np.ndarray], take: Take) -> None:
    """``IdIndex(ids).find(query)`` for a search that is done once: both sides are sorted, and no index is made.

    A sort key is one word: the first bits of an id, and behind them its row. So values are sorted and no permutation,
    and sorted queries walk through sorted keys in the order of memory. Needs 8 bytes per row of ``ids``.

    ``query`` comes in blocks uint8[m, 16]. ``take`` gets some of its rows, counted over all blocks, and the first row
    of ``ids`` that has the id of each. It is called several times and from two threads; each row comes once, a row
    without an id in ``ids`` never.
    """
    if not len(ids):
        return
    bits = max(len(ids), _QUERIES).bit_length()
    keys, values = _sorted_keys(ids, bits), _values(ids)
    hashes = ((keys[_ALIKE:] ^ keys[:-_ALIKE]) >> np.uint64(bits)).all()
    index = None if hashes else IdIndex(ids)  # which bounds the steps

    def some(group: tuple[int, np.ndarray]) -> None:
        first, own = group
        if index is not None:
            rows = index.find(own)
            there = np.flatnonzero(rows >= 0)
            take(there + first, rows[there])
            return
        asked, sought = _sorted_keys(own, bits), _values(own)
        for start in range(0, len(asked), _BLOCK):
            mine, found = _matches_of((values, sought), keys, asked[start : start + _BLOCK], bits)
            take(mine + first, found)

    groups = _grouped(query)
    with ThreadPoolExecutor(_SEARCHERS, "kdcache-ids") as pool:
        while together := list(itertools.islice(groups, _SEARCHERS)):
            list(pool.map(some, together))


def _grouped(blocks: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Up to ``_QUERIES`` ids together, and how many came before."""
    first, count, waiting = 0, 0, list[np.ndarray]()
    for block in blocks:
        for start in range(0, len(block), _QUERIES):
            piece = block[start : start + _QUERIES]
            if count + len(piece) > _QUERIES:
                yield first, np.concatenate(waiting)
                first, count, waiting = first + count, 0, []
            waiting.append(piece)
            count += len(piece)
    if waiting:
        yield first, waiting[0] if len(waiting) == 1 else np.concatenate(waiting)


def _sorted_keys(ids: np.ndarray, bits: int) -> np.ndarray:
    """uint64[n], ascending: the first bits of each id, and its row in the last ``bits``."""
    keys, rows = np.empty(len(ids), np.uint64), np.arange(_BLOCK, dtype=np.uint64)
    for first in range(0, len(ids), _BLOCK):
        words = _first_word(ids[first : first + _BLOCK])
        words >>= np.uint64(bits)
        words <<= np.uint64(bits)
        words += rows[: len(words)]
        words += np.uint64(first)
        keys[first : first + _BLOCK] = words
    keys.sort()
    return keys


def _matches_of(
    values: tuple[np.ndarray, np.ndarray], keys: np.ndarray, asked: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """``match`` of a block of sorted queries; ids that share their first bits are compared one after the other."""
    number = np.uint64((1 << bits) - 1)
    first_bits, mine = asked & ~number, (asked & number).astype(np.int64)
    place, wanted = np.searchsorted(keys, first_bits), values[1][mine]
    found: list[tuple[np.ndarray, np.ndarray]] = []
    while len(mine):
        key = keys[np.minimum(place, len(keys) - 1)]
        candidate = (key & number).astype(np.int64)
        here, sought = (value.view(np.uint64).reshape(-1, 2) for value in (values[0][candidate], wanted))
        equal = (here[:, 0] == sought[:, 0]) & (here[:, 1] == sought[:, 1])
        if equal.all():  # nearly always, at once
            found.append((mine, candidate))
            break
        found.append((mine[equal], candidate[equal]))
        going = np.flatnonzero(~equal & ((key & ~number) == first_bits) & (place + 1 < len(keys)))
        mine, wanted, first_bits, place = mine[going], wanted[going], first_bits[going], place[going] + 1
    return (
        found[0] if len(found) == 1 else (np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found]))
    )


_TOGETHER = 1 << 16  # ids of one search
_BLOCK = 1 << 13  # of a search in sorted ids: its arrays stay below the size from which malloc maps fresh pages
_QUERIES = 1 << 20  # that are sorted together
_SEARCHERS = 2  # threads
_ALIKE = 64  # ids with the same first bits that are compared one by one


def order_of_words(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Rows sorted by both words, then by number, so that of equal ids the first row is found; int32 if possible.

    Rows are sorted by the first word, and the few rows that share it are sorted again. Sorting all rows by both words
    takes three times as long.
    """
    order = np.argsort(high).astype(np.int32 if len(high) < 2**31 else np.int64)
    sorted_high = high[order]
    same = np.flatnonzero(sorted_high[1:] == sorted_high[:-1])
    if len(same):
        open_places = np.union1d(same, same + 1)
        rows = order[open_places]
        order[open_places] = rows[np.lexsort((rows, low[rows], high[rows]))]
    return order


def id_words(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of each id as numbers, uint64[n]; they sort as ids do."""
    return _first_word(ids), _whole(ids).view(">u8")[:, 1].astype(np.uint64)


def _first_word(ids: np.ndarray) -> np.ndarray:
    """The first eight bytes of each id as a number, uint64[n]."""
    return _whole(ids).view(">u8")[:, 0].astype(np.uint64)


def _values(ids: np.ndarray) -> np.ndarray:
    """Each id as one element of sixteen bytes [n]: numpy gathers those six times as fast as rows of two words.

    Complex numbers are never computed with, only copied.
    """
    return _whole(ids).view(np.complex128).reshape(-1)


def _whole(ids: np.ndarray) -> np.ndarray:
    if ids.ndim != 2 or ids.shape[1] != ID_BYTES or ids.dtype != np.uint8:
        raise ValueError(f"ids must be uint8[n, {ID_BYTES}], not {ids.dtype}{list(ids.shape)}")
    return np.ascontiguousarray(ids)
