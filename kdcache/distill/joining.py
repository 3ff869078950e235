"""How the rows of the data and those of a cache meet: by content, with what is missing on either side counted and named.

Whoever distils from a cache without texts brings the data that it was made from, or believes to. A file that was edited,
sorted otherwise or cut short still joins row by row; what does not join is said before a student is trained on the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.ids import IdIndex

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.distill.data import StudentData


@dataclass(frozen=True)
class SplitJoin:
    """A split of the data: ``missing`` of its ``rows`` have a text that the cache lacks, ``extra`` texts of the cache it lacks."""

    split: str
    rows: int
    missing: int
    extra: int
    first_missing: str = ""  # text id, and the beginning of the text
    first_extra: str = ""  # text id

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without what is empty."""
        return {name: value for name, value in vars(self).items() if name != "split" and value != ""}

    def lines(self) -> list[str]:
        """For people; nothing where everything joins."""
        lines = []
        if self.missing:
            lines.append(
                f"{self.split}: {self.missing:,} of {self.rows:,} rows have a text that the cache lacks; the first: {self.first_missing}"
            )
        if self.extra:
            lines.append(
                f"{self.split}: {self.extra:,} texts of the cache are not in the data and are not used; the first: {self.first_extra}"
            )
        return lines


def join_counts(data: StudentData, cache: Cache | None) -> tuple[SplitJoin, ...]:
    """Per split of the recipe's data, what joins the cache; empty where the cache gives the data itself."""
    if cache is None or data.origin != "recipe":
        return ()
    return tuple(_join(data, cache, split) for split in data.splits)


def _join(data: StudentData, cache: Cache, split: str) -> SplitJoin:
    ids = np.asarray(data.splits[split].text_ids)
    missing = np.flatnonzero(cache.locate(ids)[0] < 0)
    stored = np.unique(cache.examples(split).text_ids, axis=0) if split in cache.splits else ids[:0]
    extra = np.flatnonzero(IdIndex(ids).find(stored) < 0)
    first = ""
    if len(missing):
        one = ids[missing[0]].tobytes()
        first = f"{one.hex()} {' | '.join(data.texts[one])[:60]!r}"
    return SplitJoin(split, len(ids), len(missing), len(extra), first, stored[extra[0]].tobytes().hex() if len(extra) else "")
