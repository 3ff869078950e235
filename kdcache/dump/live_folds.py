"""The audit of out-of-fold logits: the bundles of the folds are run again, and what each was trained on is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcache.errors import MismatchError
from kdcache.teachers.bundle import read_bundle
from kdcache.teachers.folds import FoldLogits, fold_directory, read_folds, rows_where
from kdcache.teachers.joint import examples_digest
from kdcache.teachers.registration import present_logits

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.dump.audit import PartRows


@dataclass(frozen=True)
class LiveFolds:
    """The present answers of the bundles of the folds; None without such bundles.

    ``fault``: what is wrong with the folds; None if they are right, or ``unchecked`` because the train rows of the
    cache are not those of co-finetuning.
    """

    logits: FoldLogits | None
    fault: str | None
    unchecked: bool = False

    def instead_of(self, logits: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
        """``logits`` [n, classes], those of train texts from the bundle that did not see them."""
        return logits if self.logits is None else self.logits.instead_of(logits, text_ids)


def open_folds(
    cache: Cache,
    teachers_dir: Path,
    name: str,
    chosen: Sequence[PartRows],
    *,
    trusted: bool = False,
) -> LiveFolds | None:
    """Run the bundles of the folds on those of the ``chosen`` texts that they did not see.

    None for a teacher without folds in the cache. Raises DamageError for files that are not those of teachers.json.
    """
    spec = cache.teachers[name].folds
    if spec is None:
        return None
    try:
        found = read_folds(teachers_dir, name)
    except MismatchError as error:
        return LiveFolds(None, error.message)
    if found is None or found.spec != spec:
        return LiveFolds(None, f"the cache has logits from {spec}, the teachers have {found and found.spec}")
    unchecked, fault = _training(cache, teachers_dir, name, found)
    return LiveFolds(_present(teachers_dir, name, found, chosen, trusted), fault, unchecked)


def _training(cache: Cache, teachers_dir: Path, name: str, found: FoldLogits) -> tuple[bool, str | None]:
    """Whether it cannot be checked, and the first bundle that was not trained on exactly the rows outside its fold."""
    training = read_bundle(teachers_dir).training
    of_all = training["added"].get(name, training["identity"])
    examples = cache.examples("train")
    if examples_digest(examples) != of_all["data.train"]:
        return True, None
    places = found.places(examples.text_ids)
    if (places[examples.labels >= 0] < 0).any():
        return False, "some labelled train texts are in no fold"
    fold_of = np.where(places >= 0, found.folds[places], -1)
    for fold in range(len(found.spec.weights)):
        training = read_bundle(fold_directory(teachers_dir, fold)).training
        rest = rows_where(examples, fold_of != fold)
        if training["added"].get(name, training["identity"])["data.train"] != examples_digest(rest):
            return False, f"the bundle of fold {fold + 1} was not trained on exactly the rows outside this fold"
    return False, None


def _present(
    teachers_dir: Path,
    name: str,
    found: FoldLogits,
    chosen: Sequence[PartRows],
    trusted: bool,
) -> FoldLogits | None:
    """The answers on the ``chosen`` texts; one model is in memory at a time. None if none of them is a train text."""
    ids = np.concatenate([part.text_ids for part in chosen])
    texts = [text for part in chosen for text in part.texts]
    places = found.places(ids)
    rows = np.flatnonzero(places >= 0)
    if not len(rows):
        return None
    folds = found.folds[places[rows]]
    logits = np.empty((len(rows), found.logits.shape[1]), np.float32)
    for fold in np.unique(folds).tolist():
        directory, own = fold_directory(teachers_dir, fold), np.flatnonzero(folds == fold)
        asked = [texts[row] for row in rows[own].tolist()]
        logits[own] = present_logits(directory, name, read_bundle(directory), asked, {name} if trusted else ())
    return replace(found, text_ids=ids[rows], folds=folds, logits=logits)
