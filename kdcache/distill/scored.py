"""The splits that a student is scored on, in its tokens, and its logits on them.

Logits that are not finite are an error. The loss of a step is checked before its update, so the outputs alone show what
the last update did; and a row of NaN would count as an answer, because its argmax is class 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from kdcache.data.encoding import truncation_note
from kdcache.distill.results import SCORED
from kdcache.errors import NonFiniteError
from kdcache.students.score import EncodedSplit, encode_split, split_logits
from kdcache.training.step_log import NOT_FINITE_HINT

if TYPE_CHECKING:
    from torch import nn

    from kdcache.distill.setup import Training
    from kdcache.loading.targets import TargetSource
    from kdcache.progress import Progress


def encoded_splits(training: Training, progress: Progress) -> dict[str, EncodedSplit]:
    """The splits that are scored, as the student reads them."""
    student, data = training.student, training.data
    splits = {
        name: encode_split(student, data.texts_of(name), data.splits[name].labels)
        for name in SCORED
        if name in data.splits
    }
    for name, split in splits.items():
        cut, rows = split.encoded.truncated_count, len(split.encoded)
        for line in truncation_note(f"student, {name}", cut, rows, student.max_length):
            progress.note(line)
    return splits


def truncated(source: TargetSource, splits: Mapping[str, EncodedSplit]) -> dict[str, float]:
    """Per split, the share of the texts that the student reads cut."""
    train = {} if source.truncated is None else {"train": source.truncated}
    encoded = {name: split.encoded for name, split in splits.items() if len(split.encoded)}
    return train | {name: texts.truncated_count / len(texts) for name, texts in encoded.items()}


def final_logits(training: Training, splits: Mapping[str, EncodedSplit], step: int) -> dict[str, np.ndarray]:
    """Logits float32 [rows, classes] of the trained student on each split; ``step`` was its last.

    Where there is no split, a few texts of the training are read, so that no broken student is saved. Raises
    NonFiniteError.
    """
    student = training.student
    if not splits:
        texts = training.some_texts()
        unlabelled = encode_split(student, texts, np.full(len(texts), -1))
        finite_logits(student.model, unlabelled, "train", step)
    return {name: finite_logits(student.model, split, name, step) for name, split in splits.items()}


def finite_logits(model: nn.Module, split: EncodedSplit, name: str, step: int) -> np.ndarray:
    """Logits float32 [rows, classes] on the split ``name`` after optimizer step ``step`` (from 1).

    Raises NonFiniteError for NaN and infinity.
    """
    logits = split_logits(model, split)
    bad = len(logits) - int(np.isfinite(logits).all(axis=1).sum())
    if bad:
        raise NonFiniteError(
            f"the student is not finite after step {step}: {bad} of {len(logits)} {name} rows have logits with NaN or "
            "infinity",
            NOT_FINITE_HINT,
        )
    return logits
