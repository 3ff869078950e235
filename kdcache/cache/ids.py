"""Text ids: the name of a text is a hash of exactly what the tokenizers are given.

A position in a file, a split or a label says nothing about a text, and aligning targets by position is what broke other
teacher caches. The id depends on the text alone, so examples, targets and students meet by id on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from kdcache.errors import DataError

ID_BYTES = 16


def text_id(columns: Sequence[str]) -> bytes:
    """The 16-byte id of a text: BLAKE2b-128 over its columns, each as UTF-8 behind its byte length (uint64, little-endian).

    The length prefixes keep ``("ab", "c")`` and ``("a", "bc")`` apart. Raises DataError where a column holds half of a
    surrogate pair, which has no UTF-8 form.
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
    """The order in which texts enter a cache: by BLAKE2b-128 of the id, keyed with the seed (int64, little-endian).

    A pure function of the set of ids and the seed: not of the order of files, and not of any library's generator.
    """
    key = seed.to_bytes(8, "little", signed=True)
    return sorted(ids, key=lambda one: (hashlib.blake2b(one, digest_size=ID_BYTES, key=key).digest(), one))


def ids_digest(parts: Iterable[np.ndarray]) -> str:
    """The fingerprint of a set of texts: sha256 (hex) over their sorted distinct ids. Equal for the same texts however they are cut."""
    ids = np.concatenate([np.zeros((0, ID_BYTES), np.uint8), *parts])
    return hashlib.sha256(np.unique(ids, axis=0).tobytes()).hexdigest()


class IdIndex:
    """Finds rows by id, in bulk: ids sorted once as pairs of 64-bit words, then binary search."""

    def __init__(self, ids: np.ndarray) -> None:
        high, low = _words(ids)
        self._order = np.lexsort((low, high))  # stable: of equal ids the first row is found
        self._high, self._low = high[self._order], low[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def find(self, query: np.ndarray) -> np.ndarray:
        """The row of each id of ``query`` (``uint8[m, 16]``) as ``int64[m]``; -1 where it is absent."""
        high, low = _words(query)
        if not len(self._order):
            return np.full(len(high), -1, dtype=np.int64)
        place = np.searchsorted(self._high, high, side="left")
        last = len(self._order) - 1
        while True:  # ids that share their first word: steps over those with a smaller second word
            here = np.minimum(place, last)
            behind = (place <= last) & (self._high[here] == high) & (self._low[here] < low)
            if not behind.any():
                break
            place = place + behind
        found = (place <= last) & (self._high[here] == high) & (self._low[here] == low)
        return np.where(found, self._order[here], -1).astype(np.int64)


def _words(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if ids.ndim != 2 or ids.shape[1] != ID_BYTES or ids.dtype != np.uint8:
        raise ValueError(f"ids must be uint8[n, {ID_BYTES}], not {ids.dtype}{list(ids.shape)}")
    words = np.ascontiguousarray(ids).view(">u8").astype(np.uint64)
    return words[:, 0], words[:, 1]
