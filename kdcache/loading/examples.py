"""The examples that a student learns from, joined to a cache by text id, never by position.

The join reads the manifest, the examples of the splits and the ids of the texts, not the targets, so an epoch starts
without a scan of the cache. Of each example only its label and the place of its text stay in memory, a few bytes, or
mapped where there are millions of them; its id is read again from the part when it is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from kdcache.cache import buckets, layout
from kdcache.cache.ids import ID_BYTES, Examples
from kdcache.cache.memory import give_back_freed
from kdcache.errors import MismatchError
from kdcache.kept import Kept, kept_or_made
from kdcache.loading.order import blocks, distinct_parts

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache


TRANSFER = "transfer"  # the split of texts without labels
ExamplesOf = Callable[[str], Examples]  # split -> its rows: ``Cache.examples``, or those of data files
_FORMAT = 1  # of kept joins: raise it when a join gives another result for the same input
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

    @classmethod
    def of(cls, stored: np.ndarray) -> Integers:
        """Integers that have the smallest dtype already; they are not copied."""
        made = cls.__new__(cls)
        made._values = stored
        return made

    @property
    def stored(self) -> np.ndarray:
        return self._values

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
    examples: ExamplesOf | None,
    splits: Sequence[str],
    *,
    missing: Literal["error", "skip"] = "error",
    hidden: bool = False,
    logits: bool = True,
) -> JoinedExamples:
    """The ``examples`` of ``splits``, one split after the other, with the place of their texts in ``cache``.

    None for ``examples`` means those of the cache. Millions of them are joined once, and what was found is kept in a
    file of the home directory, which is mapped from then on (docs/decisions/0040).

    With ``hidden``, train texts need hidden states. Transfer texts may be stored with logits only; they are left out
    where no ``logits`` are read, because nothing could be learned from them.

    Raises MismatchError where a text is not in the cache, or lacks the hidden states that it needs, unless ``missing``
    is 'skip'; and where no example is left.
    """

    def join() -> JoinedExamples:
        table = _table(cache, examples, splits)
        return _join(cache, table, _names(splits), missing, hidden=hidden, logits=logits)

    if _count(cache, examples, splits) > buckets.LARGE:
        key = _kept_key(cache, examples, splits, missing, hidden=hidden, logits=logits)
        joined = _of_kept(cache, kept_or_made("joins", key, lambda: _as_kept(join())))
    else:
        joined = join()
    give_back_freed()
    return joined


def _count(cache: Cache, examples: ExamplesOf | None, splits: Sequence[str]) -> int:
    """The number of texts or of examples, whichever is larger."""
    rows = (cache.example_count(split) if examples is None else len(examples(split).labels) for split in splits)
    return max(sum(rows), sum(part.texts for part in cache.parts))


def stored_logits(cache: Cache, teachers: Sequence[str], examples: JoinedExamples) -> np.ndarray:
    """The teachers' stored logits of ``examples`` in their order, float32 [N, n, C]."""
    places = distinct_parts(examples.parts)
    cache.expect([layout.outputs_file(teacher, cache.parts[part].name) for teacher in teachers for part in places])
    found = np.empty((len(teachers), len(examples), len(cache.task.label_names)), np.float32)
    for index, teacher in enumerate(teachers):
        for part in places:
            mine = np.flatnonzero(examples.parts == part)
            found[index, mine] = cache.outputs(teacher, cache.parts[part].name).logits[examples.rows[mine]]
    return found


@dataclass(frozen=True)
class _Table:
    """All n examples of some splits: labels int [n], and which are transfer texts; their ids block by block."""

    labels: np.ndarray
    transfer: np.ndarray  # bool[n]
    ids: Callable[[], Iterator[np.ndarray]]  # uint8 [m, 16]

    def id_at(self, row: int) -> bytes:
        for ids in self.ids():
            if row < len(ids):
                return bytes(ids[row])
            row -= len(ids)
        raise IndexError(row)

    def places(self, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
        """``Cache.locate`` of all ids."""
        return cache.locate_blocks(self.ids, len(self.labels))


def _table(cache: Cache, examples: ExamplesOf | None, splits: Sequence[str]) -> _Table:
    """The cache's own examples stay in their file where there are many."""
    if examples is None and sum(map(cache.example_count, splits)) > buckets.LARGE:
        labels = [cache.example_labels(split) for split in splits]
        ids: Callable[[], Iterator[np.ndarray]] = lambda: (  # noqa: E731
            block for split in splits for block in cache.example_ids(split)
        )
    else:
        tables = [(examples or cache.examples)(split) for split in splits]
        labels = [table.labels for table in tables]
        ids = lambda: (  # noqa: E731
            table.text_ids[some] for table in tables for some in blocks(len(table.text_ids))
        )
    counts = [len(own) for own in labels]
    transfer = np.repeat([split == TRANSFER for split in splits], counts)
    return _Table(labels[0] if len(labels) == 1 else np.concatenate(labels), transfer, ids)


def _join(
    cache: Cache, table: _Table, names: str, missing: Literal["error", "skip"], *, hidden: bool, logits: bool
) -> JoinedExamples:
    parts, rows = table.places(cache)
    in_full = np.array([part.scope == "full" for part in cache.parts] + [False])  # -1 indexes the last
    usable, logits_only = np.empty(len(parts), np.bool_), np.empty(len(parts), np.bool_)
    for some in blocks(len(parts)):
        there, full, transfer = parts[some] >= 0, in_full[parts[some]], table.transfer[some]
        usable[some] = there & (full | transfer) if hidden else there
        logits_only[some] = transfer & there & ~full
    lacking = len(parts) - int(np.count_nonzero(usable))
    if lacking and missing == "error":
        raise _lacking(cache, names, table, parts, int(np.argmin(usable)), lacking)
    if hidden and not logits:
        for some in blocks(len(parts)):
            usable[some] &= in_full[parts[some]]
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
        lacking,
        logits_only if logits_only.any() else None,
    )


def _lacking(cache: Cache, names: str, table: _Table, parts: np.ndarray, row: int, count: int) -> MismatchError:
    what = "is not in the cache" if parts[row] < 0 else "is stored with logits only, without hidden states"
    return MismatchError(
        f"cache '{cache.path}' lacks {count} of the {len(parts)} texts of {names}; the first, "
        f"{table.id_at(row).hex()}, {what}",
        'Dump the new rows with kdcache dump-teachers, or leave them out with distill.missing = "skip".',
    )


def _kept_key(
    cache: Cache, examples: ExamplesOf | None, splits: Sequence[str], missing: str, *, hidden: bool, logits: bool
) -> str:
    """A digest of all that a join depends on: ids and labels of the examples, ids of the parts, and what is wanted."""
    contents = cache.manifest.contents
    parts = [
        [part.name, part.scope, part.texts, contents.files[layout.ids_file(part.name)].sha256] for part in cache.parts
    ]
    tables = []
    for split in splits:
        if examples is None:
            tables.append([split, contents.files[contents.splits[split].file].sha256])
        else:
            table = examples(split)
            tables.append([split, *(_sha256(array) for array in (table.text_ids, table.labels))])
    document = [_FORMAT, parts, tables, len(cache.task.label_names), missing, hidden, logits]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _as_kept(joined: JoinedExamples) -> Kept:
    rows, labels = joined.rows, joined.labels
    assert isinstance(rows, Integers) and isinstance(labels, Integers)
    arrays = {"parts": joined.parts, "rows": rows.stored, "labels": labels.stored}
    if joined.logits_only is not None:
        arrays["logits_only"] = joined.logits_only
    return Kept(arrays, {"skipped": joined.skipped})


def _of_kept(cache: Cache, kept: Kept) -> JoinedExamples:
    arrays = kept.arrays
    rows, labels = Integers.of(arrays["rows"]), Integers.of(arrays["labels"])
    ids = StoredIds(cache, arrays["parts"], rows)
    return JoinedExamples(ids, labels, arrays["parts"], rows, kept.document["skipped"], arrays.get("logits_only"))


def _names(splits: Sequence[str]) -> str:
    return " and ".join(f"'{split}'" for split in splits)
