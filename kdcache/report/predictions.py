"""``predictions.safetensors`` of a run: what student and teachers answered on each row of validation and test.

The student's logits are kept in full. Of each teacher only the predicted class and its probability are kept: the cache
has the logits, and the page of a run needs no more. So the file is smaller than the logits of one teacher in the cache,
apart from 8 bytes per row and teacher. Rows carry their text ids, by which their texts are found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdcache.cache.ids import ID_BYTES
from kdcache.errors import DamageError
from kdcache.files import write_file

_FORMAT = "1"
MEAN, WEIGHTED_MEAN = "mean of teachers", "weighted mean of teachers"  # no name of a teacher has a space


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of one model to n rows: classes int64[n] and their probabilities float32[n]."""

    predictions: np.ndarray
    confidence: np.ndarray

    @classmethod
    def of_logits(cls, logits: np.ndarray) -> Answers:
        """The most likely class of each row of ``logits`` [n, C], and its softmax probability."""
        logits = np.asarray(logits)
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return cls(logits.argmax(axis=1).astype(np.int64), (1.0 / np.exp(shifted).sum(axis=1)).astype(np.float32))


@dataclass(frozen=True, eq=False)
class SplitPredictions:
    """The rows of a split, in its order.

    Attributes:
        text_ids: uint8[n, 16].
        labels: int64[n], -1 = none.
        logits: of the student, float32[n, C].
        teachers: answers by teacher; those of several are followed by their (weighted) mean probability.
    """

    text_ids: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    teachers: Mapping[str, Answers]

    @property
    def student(self) -> Answers:
        """The answers of the student."""
        return Answers.of_logits(self.logits)


def write_predictions(path: Path, splits: Mapping[str, SplitPredictions]) -> None:
    """Write the file, durably. Raises StorageError."""
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    for name, split in splits.items():
        arrays[f"{name}/text_ids"] = np.ascontiguousarray(split.text_ids, dtype=np.uint8)
        arrays[f"{name}/labels"] = np.ascontiguousarray(split.labels, dtype=np.int64)
        arrays[f"{name}/logits"] = np.ascontiguousarray(split.logits, dtype=np.float32)
        for number, answers in enumerate(split.teachers.values()):
            arrays[f"{name}/teacher-{number}/predictions"] = answers.predictions.astype(np.int32)
            arrays[f"{name}/teacher-{number}/confidence"] = answers.confidence.astype(np.float32)
    teachers = {name: list(split.teachers) for name, split in splits.items()}
    record = {"format": _FORMAT, "teachers": teachers}  # one key: safetensors writes several in any order
    write_file(path, save(arrays, {"kdcache": json.dumps(record, ensure_ascii=False)}))


def read_predictions(path: Path) -> dict[str, SplitPredictions]:
    """The splits of the file; empty where there is none. Raises DamageError."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            record = json.loads((file.metadata() or {})["kdcache"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if record["format"] != _FORMAT:
            raise ValueError(f"its format is {record['format']!r}, expected '{_FORMAT}'")
        return {name: _split(name, list(of), arrays) for name, of in record["teachers"].items()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(
            f"'{path}' is not readable: {str(error)[:200]}", "Make it again: kdcache report RUN --predict"
        ) from error


def _split(name: str, teachers: list[str], arrays: Mapping[str, np.ndarray]) -> SplitPredictions:
    labels, logits = arrays[f"{name}/labels"], arrays[f"{name}/logits"]
    ids, rows = arrays[f"{name}/text_ids"], len(labels)
    if labels.ndim != 1 or logits.shape[:1] != (rows,) or logits.ndim != 2 or ids.shape != (rows, ID_BYTES):
        raise ValueError(f"the arrays of '{name}' do not belong together")
    answers = {}
    for number, teacher in enumerate(teachers):
        predictions = arrays[f"{name}/teacher-{number}/predictions"]
        confidence = arrays[f"{name}/teacher-{number}/confidence"]
        if predictions.shape != (rows,) or confidence.shape != (rows,):
            raise ValueError(f"the arrays of teacher '{teacher}' on '{name}' do not belong together")
        answers[str(teacher)] = Answers(predictions.astype(np.int64), confidence)
    classes = logits.shape[1]
    if any(
        len(found) and not -1 <= int(found.min()) <= int(found.max()) < classes
        for found in (labels, *(each.predictions for each in answers.values()))
    ):
        raise ValueError(f"'{name}' has a class beyond the {classes} of the student")
    return SplitPredictions(ids, labels, logits, answers)
