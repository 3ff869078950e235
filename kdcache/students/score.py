"""Scores of a student: on the splits of its task while it trains, and on any file afterwards.

Texts go through the model sorted by length, in float32; the order of the rows does not change the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.data.encoding import EncodedTexts, encode
from kdcache.data.task import read_examples
from kdcache.errors import RecipeError
from kdcache.progress import listed_apart
from kdcache.report.metrics import scores
from kdcache.students.model import Student, StudentModel
from kdcache.students.save import load_student, read_record
from kdcache.training.device import default_device
from kdcache.training.predict import predict

if TYPE_CHECKING:
    import numpy as np

_TOKENS_PER_ROW = 128  # a batch of n rows is n x 128 padded tokens


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """A split in the student's tokens, one row per example; ``labels`` int64[n], -1 = none."""

    encoded: EncodedTexts
    labels: np.ndarray
    pad_token_id: int


def encode_split(student: Student, texts: Sequence[tuple[str, ...]], labels: np.ndarray) -> EncodedSplit:
    """Tokens of every row, by the student's tokenizer."""
    return EncodedSplit(
        encode(student.tokenizer, texts, student.max_length), labels, int(student.tokenizer.pad_token_id)
    )


def split_logits(model: StudentModel, split: EncodedSplit, batch: int = 32) -> np.ndarray:
    """Logits float32 [rows, classes] in the order of the rows; ``batch`` rows of 128 tokens in one forward pass."""
    return predict(model, split.encoded, split.pad_token_id, batch * _TOKENS_PER_ROW)


def split_scores(model: StudentModel, split: EncodedSplit, batch: int = 32) -> dict[str, float]:
    """``accuracy``, ``macro_f1``, ``matthews`` and ``loss`` of the model on a split."""
    return scores(split.labels, split_logits(model, split, batch))


def selection_score(metrics: Mapping[str, float], select_by: str) -> float:
    """The number whose maximum marks the best epoch: the metric, or the negative loss."""
    return -metrics["loss"] if select_by == "loss" else metrics[select_by]


def evaluate_model(
    model_dir: str | Path,
    source: str,
    *,
    text: Sequence[str] | None = None,
    label: str | None = None,
    max_length: int | None = None,
    batch: int = 32,
    labels: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """Scores of a saved model on a file (or hub data set).

    A student of kdcache knows its text and label columns, label names and max_length; arguments override. A sequence
    classifier from elsewhere has no record, so the columns must be named. Both heads load.

    Args:
        model_dir: a student of kdcache, or a directory that ``AutoModelForSequenceClassification`` loads.
        source: a file, or the name of a hub data set.
        text: one column, or two for pairs.
        label: the label column.
        max_length: tokens that are read of a text.
        batch: rows of 128 tokens in one forward pass.
        labels: class names by the numbers that the file has for labels, where the model's order is another.
        trust_remote_code: whether the model may run Python code that lies in its directory.

    Returns:
        ``accuracy``, ``macro_f1``, ``matthews``, ``loss`` and ``rows``, how many were scored. Where there are any, also
        ``left_out``, rows without text, and ``truncated``, rows of more than max_length tokens.

    Raises:
        RecipeError: the columns are not known, or ``labels`` are not the model's.
        DataError: the file cannot be read.
        ModelError: the model cannot be loaded.
        DamageError: the model's files are damaged.
    """
    directory = Path(model_dir)
    record = read_record(directory)
    text = text or (record.text_columns if record else None)
    label = label or (record.label_column if record else None)
    if text is None or label is None:
        raise RecipeError(
            f"model '{directory}' has no record of its text and label columns (kdcache.json)",
            "Name them: --text COLUMN (twice for pairs) and --label COLUMN.",
        )
    student = load_student(directory, trust_remote_code=trust_remote_code)
    if labels is not None and sorted(labels) != sorted(student.label_names):
        ours, theirs = listed_apart(tuple(labels), student.label_names)
        raise RecipeError(f"--labels are {ours}; model '{directory}' knows {theirs}", "Name each of its classes once.")
    declared = record is None or record.labels_declared is not False
    rows = read_examples(source, list(text), label, student.label_names, labels_declared=declared, numbered_as=labels)
    if max_length is not None:
        student = Student(student.model, student.tokenizer, student.label_names, max_length, student.source)
    student.model.to(default_device())
    split = encode_split(student, rows.texts, rows.labels)
    odd = {"left_out": rows.empty, "truncated": split.encoded.truncated_count}
    counts = {"rows": len(rows.labels), **{name: count for name, count in odd.items() if count}}
    return {**split_scores(student.model, split, batch), **counts}
