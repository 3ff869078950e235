"""The examples that a student learns from, joined to a cache by text id: never by position, never by file.

Joining needs the manifest, the examples of the split and the ids of the texts, not the targets: an epoch starts without a
scan of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from kdcache.errors import MismatchError

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache


@dataclass(frozen=True, eq=False)
class JoinedExamples:
    """``n`` examples and where their texts lie: ``parts`` int32[n] (index into ``cache.parts``) and ``rows`` int64[n]."""

    text_ids: np.ndarray  # uint8[n, 16]
    labels: np.ndarray  # int64[n], -1 = none
    parts: np.ndarray
    rows: np.ndarray
    skipped: int  # examples left out because the cache lacks their text

    def __len__(self) -> int:
        return len(self.labels)


def join_examples(
    cache: Cache, splits: tuple[str, ...], *, missing: Literal["error", "skip"] = "error", hidden: bool = False
) -> JoinedExamples:
    """The examples of ``splits``, one split after the other, with the place of their texts.

    Raises MismatchError where a text is not in the cache, or only with logits where ``hidden`` states are wanted, unless
    ``missing`` is 'skip'; and where no example is left.
    """
    tables = [cache.examples(split) for split in splits]
    text_ids = np.concatenate([table.text_ids for table in tables])
    labels = np.concatenate([table.labels for table in tables]).astype(np.int64)
    parts, rows = cache.locate(text_ids)
    usable = parts >= 0
    if hidden:
        full = np.array([part.scope == "full" for part in cache.parts] + [False])
        usable &= full[parts]  # -1 meets the False at the end
    lacking = np.flatnonzero(~usable)
    if len(lacking) and missing == "error":
        raise _lacking(cache, splits, text_ids, parts, lacking)
    if not usable.any():
        raise MismatchError(
            f"cache '{cache.path}' holds the text of none of the {len(labels)} examples of {_names(splits)}",
            "Check that cache and recipe belong together: kdcache cache info",
        )
    return JoinedExamples(text_ids[usable], labels[usable], parts[usable], rows[usable].astype(np.int64), len(lacking))


def _lacking(
    cache: Cache, splits: tuple[str, ...], text_ids: np.ndarray, parts: np.ndarray, lacking: np.ndarray
) -> MismatchError:
    first = text_ids[lacking[0]].tobytes().hex()
    what = "is not in the cache" if parts[lacking[0]] < 0 else "is there with logits only, without hidden states"
    return MismatchError(
        f"cache '{cache.path}' lacks {len(lacking)} of the {len(text_ids)} texts of {_names(splits)}; the first, {first}, {what}",
        'Dump the new rows with kdcache dump-teachers, or leave them out with distill.missing = "skip".',
    )


def _names(splits: tuple[str, ...]) -> str:
    return " and ".join(f"'{split}'" for split in splits)
