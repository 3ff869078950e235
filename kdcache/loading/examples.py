"""The examples that a student learns from, joined to a cache by text id, never by position.

The join reads the manifest, the examples of the splits and the ids of the texts, not the targets, so an epoch starts
without a scan of the cache. Of each example only its label and the place of its text stay in memory, a few bytes; its
id is read again from the part when it is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from kdcache.cache import layout
from kdcache.cache.ids import ID_BYTES, Examples
from kdcache.cache.memory import give_back_freed
from kdcache.errors import MismatchError

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache


ExamplesOf = Callable[[str], Examples]  # split -> its rows: ``Cache.examples``, or those of data files
_AT_HAND = 64  # parts whose ids stay in memory, 64 KB each by default: more than a window has


@dataclass(frozen=True, eq=False)
class JoinedExamples:
    """``n`` examples and the places of their texts: row ``rows[i]`` of ``cache.parts[parts[i]]``.

    ``text_ids``, ``labels`` and ``rows`` are compact; indexing them gives numpy arrays.
    """

    text_ids: np.ndarray | StoredIds  # indexed: uint8[m, 16]
    labels: np.ndarray | Integers  # indexed: int64[m], -1 = none
    parts: np.ndarray  # int32[n]
    rows: np.ndarray | Integers  # indexed: int64[m]
    skipped: int  # examples left out because the cache lacks their text

    def __len__(self) -> int:
        return len(self.parts)


class Integers:
    """Integers stored in the smallest dtype that fits; indexing gives int64."""

    def __init__(self, values: np.ndarray) -> None:
        dtypes = np.min_scalar_type(values.min(initial=0)), np.min_scalar_type(values.max(initial=0))
        self._values = values.astype(np.result_type(*dtypes))

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, which: np.ndarray | slice) -> np.ndarray:
        return self._values[which].astype(np.int64)


class StoredIds:
    """The ids of texts in a cache, read from their parts when indexed."""

    def __init__(self, cache: Cache, parts: np.ndarray, rows: Integers) -> None:
        names = [part.name for part in cache.parts]
        self._parts, self._rows = parts, rows
        self._ids = functools.lru_cache(_AT_HAND)(lambda part: cache.text_ids(names[part]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, which: np.ndarray | slice) -> np.ndarray:
        """uint8 [m, 16]."""
        parts, rows = self._parts[which], self._rows[which]
        ids = np.empty((len(rows), ID_BYTES), np.uint8)
        for part in np.unique(parts).tolist():
            mine = parts == part
            ids[mine] = self._ids(part)[rows[mine]]
        return ids


def join_examples(
    cache: Cache,
    examples: ExamplesOf,
    splits: Sequence[str],
    *,
    missing: Literal["error", "skip"] = "error",
    hidden: bool = False,
) -> JoinedExamples:
    """The ``examples`` of ``splits``, one split after the other, with the place of their texts in ``cache``.

    Raises MismatchError where a text is not in the cache, or only with logits where ``hidden`` states are wanted,
    unless ``missing`` is 'skip'; and where no example is left.
    """
    joined = _join(cache, *_concatenated(examples, splits), _names(splits), missing, hidden=hidden)
    give_back_freed()
    return joined


def stored_logits(cache: Cache, teachers: Sequence[str], examples: JoinedExamples) -> np.ndarray:
    """The teachers' stored logits of ``examples`` in their order, float32 [N, n, C]."""
    places = np.unique(examples.parts).tolist()
    cache.expect([layout.outputs_file(teacher, cache.parts[part].name) for teacher in teachers for part in places])
    found = np.empty((len(teachers), len(examples), len(cache.task.label_names)), np.float32)
    for index, teacher in enumerate(teachers):
        for part in places:
            mine = np.flatnonzero(examples.parts == part)
            found[index, mine] = cache.outputs(teacher, cache.parts[part].name).logits[examples.rows[mine]]
    return found


def _join(
    cache: Cache,
    text_ids: np.ndarray,
    labels: np.ndarray,
    names: str,
    missing: Literal["error", "skip"],
    *,
    hidden: bool,
) -> JoinedExamples:
    parts, rows = cache.locate(text_ids)
    usable = parts >= 0
    if hidden:
        full = np.array([part.scope == "full" for part in cache.parts] + [False])
        usable &= full[parts]  # -1 indexes the False at the end
    lacking = np.flatnonzero(~usable)
    if len(lacking) and missing == "error":
        raise _lacking(cache, names, text_ids, parts, lacking)
    if not usable.any():
        raise MismatchError(
            f"cache '{cache.path}' holds the text of none of the {len(labels)} examples of {names}",
            "Check that cache and recipe belong together: kdcache cache info",
        )
    if len(lacking):
        labels, parts, rows = labels[usable], parts[usable], rows[usable]
    places = Integers(rows)
    return JoinedExamples(StoredIds(cache, parts, places), Integers(labels), parts, places, len(lacking))


def _concatenated(examples: ExamplesOf, splits: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids uint8[n, 16] and labels int64[n] of all ``splits``."""
    tables = [examples(split) for split in splits]
    labels = np.concatenate([table.labels for table in tables], dtype=np.int64)
    return (tables[0].text_ids if len(tables) == 1 else np.concatenate([table.text_ids for table in tables])), labels


def _lacking(cache: Cache, names: str, text_ids: np.ndarray, parts: np.ndarray, lacking: np.ndarray) -> MismatchError:
    first = text_ids[lacking[0]].tobytes().hex()
    what = "is not in the cache" if parts[lacking[0]] < 0 else "is stored with logits only, without hidden states"
    return MismatchError(
        f"cache '{cache.path}' lacks {len(lacking)} of the {len(text_ids)} texts of {names}; the first, "
        f"{first}, {what}",
        'Dump the new rows with kdcache dump-teachers, or leave them out with distill.missing = "skip".',
    )


def _names(splits: Sequence[str]) -> str:
    return " and ".join(f"'{split}'" for split in splits)
