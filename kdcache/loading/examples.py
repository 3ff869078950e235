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


TRANSFER = "transfer"  # the split of texts without labels
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
    logits_only: np.ndarray | None = None  # bool[n]: transfer texts without hidden states; None: there are none

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
    logits: bool = True,
) -> JoinedExamples:
    """The ``examples`` of ``splits``, one split after the other, with the place of their texts in ``cache``.

    With ``hidden``, train texts need hidden states. Transfer texts may be stored with logits only; they are left out
    where no ``logits`` are read, because nothing could be learned from them.

    Raises MismatchError where a text is not in the cache, or lacks the hidden states that it needs, unless ``missing``
    is 'skip'; and where no example is left.
    """
    joined = _join(cache, _concatenated(examples, splits), _names(splits), missing, hidden=hidden, logits=logits)
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


@dataclass(frozen=True)
class _Table:
    """All examples of some splits: ids uint8[n, 16], labels int64[n], and which are transfer texts."""

    text_ids: np.ndarray
    labels: np.ndarray
    transfer: np.ndarray  # bool[n]


def _join(
    cache: Cache, table: _Table, names: str, missing: Literal["error", "skip"], *, hidden: bool, logits: bool
) -> JoinedExamples:
    parts, rows = cache.locate(table.text_ids)
    in_full = np.array([part.scope == "full" for part in cache.parts] + [False])[parts]  # -1 indexes the last
    logits_only = table.transfer & (parts >= 0) & ~in_full
    usable = (parts >= 0) & (in_full | table.transfer) if hidden else parts >= 0
    lacking = np.flatnonzero(~usable)
    if len(lacking) and missing == "error":
        raise _lacking(cache, names, table.text_ids, parts, lacking)
    if hidden and not logits:
        usable &= in_full
    if not usable.any():
        raise MismatchError(
            f"cache '{cache.path}' holds the text of none of the {len(table.labels)} examples of {names}",
            "Check that cache and recipe belong together: kdcache cache info",
        )
    labels = table.labels
    if not usable.all():
        labels, parts, rows, logits_only = labels[usable], parts[usable], rows[usable], logits_only[usable]
    places = Integers(rows)
    return JoinedExamples(
        StoredIds(cache, parts, places),
        Integers(labels),
        parts,
        places,
        len(lacking),
        logits_only if logits_only.any() else None,
    )


def _concatenated(examples: ExamplesOf, splits: Sequence[str]) -> _Table:
    tables = [examples(split) for split in splits]
    one = len(tables) == 1  # not copied
    labels = tables[0].labels if one else np.concatenate([table.labels for table in tables], dtype=np.int64)
    ids = tables[0].text_ids if one else np.concatenate([table.text_ids for table in tables])
    counts = [len(table.labels) for table in tables]
    return _Table(ids, labels, np.repeat([split == TRANSFER for split in splits], counts))


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
