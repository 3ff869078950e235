"""Scores of a student: on the splits of its task while it trains, and on any file afterwards.

Texts go through the model sorted by length, in float32; the order of the rows does not change the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.data.encoding import EncodedTexts, encode, padding_id
from kdcache.data.task import read_examples
from kdcache.errors import ModelError, RecipeError
from kdcache.progress import listed_apart
from kdcache.report.metrics import scores
from kdcache.students.save import load_student, read_record
from kdcache.students.speed import measure_speed
from kdcache.teachers.bundle import is_bundle, load_teacher, read_bundle
from kdcache.teachers.teacher import TeacherModel, position_limit
from kdcache.training.device import default_device
from kdcache.training.predict import predict

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from kdcache.students.model import Student
    from kdcache.teachers.bundle import Bundle
    from kdcache.teachers.teacher import Teacher

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


def split_logits(model: nn.Module, split: EncodedSplit, batch: int = 32) -> np.ndarray:
    """Logits float32 [rows, classes] in the order of the rows; ``batch`` rows of 128 tokens in one forward pass."""
    return predict(model, split.encoded, split.pad_token_id, batch * _TOKENS_PER_ROW)


def split_scores(model: nn.Module, split: EncodedSplit, batch: int = 32) -> dict[str, float]:
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
    speed: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """Scores of a saved model on a file (or hub data set).

    A student of kdcache knows its text and label columns, label names and max_length; arguments override. A
    co-finetuned teacher knows all but the label column. A sequence classifier from elsewhere has no record, so the
    columns must be named. All heads load.

    Args:
        model_dir: a student of kdcache, a teacher in a directory of co-finetuned teachers, or a directory that
            ``AutoModelForSequenceClassification`` loads.
        source: a file, or the name of a hub data set.
        text: one column, or two for pairs.
        label: the label column.
        max_length: tokens that are read of a text; for a model from elsewhere its tokenizer's, at most 512 and its
            positions.
        batch: rows of 128 tokens in one forward pass.
        labels: class names by the numbers that the file has for labels, where the model's order is another.
        speed: whether to time forward passes too, in float32 on the device that training would take.
        trust_remote_code: whether the model may run Python code that lies in its directory.

    Returns:
        ``accuracy``, ``macro_f1``, ``matthews``, ``loss`` and ``rows``, how many were scored. Where there are any, also
        ``left_out``, rows without text, and ``truncated``, rows of more than max_length tokens. With ``speed``,
        ``latency_ms`` of single texts and ``texts_per_second`` in batches of 32.

    Raises:
        RecipeError: the columns are not known, or ``labels`` are not the model's.
        DataError: the file cannot be read.
        ModelError: the model cannot be loaded, or has fewer positions than ``max_length``.
        DamageError: the model's files are damaged.
    """
    directory = Path(model_dir)
    known = _columns(directory)
    text, label = text or known.text, label or known.label
    if text is None or label is None:
        raise RecipeError(
            f"model '{directory}' has no record of its text and label columns (kdcache.json)",
            "Name them: --text COLUMN (twice for pairs) and --label COLUMN.",
        )
    opened = _opened(directory, trust_remote_code=trust_remote_code)
    length = _length(directory, opened, max_length)
    if labels is not None and sorted(labels) != sorted(opened.label_names):
        ours, theirs = listed_apart(tuple(labels), opened.label_names)
        raise RecipeError(f"--labels are {ours}; model '{directory}' knows {theirs}", "Name each of its classes once.")
    rows = read_examples(
        source, list(text), label, opened.label_names, labels_declared=known.labels_declared, numbered_as=labels
    )
    opened.model.to(default_device())
    encoded = encode(opened.tokenizer, rows.texts, length)
    split = EncodedSplit(encoded, rows.labels, padding_id(opened.tokenizer))
    odd = {"left_out": rows.empty, "truncated": encoded.truncated_count}
    found = {**split_scores(opened.model, split, batch), "rows": len(rows.labels)}
    found |= {name: count for name, count in odd.items() if count}
    if speed and len(encoded):
        timed = measure_speed(opened.model, opened.tokenizer, length, rows.texts)
        found |= {"latency_ms": timed.latency_ms, "texts_per_second": timed.texts_per_second}
    return found


@dataclass(frozen=True)
class _Columns:
    """What a directory says about the data of its model."""

    text: Sequence[str] | None = None
    label: str | None = None
    labels_declared: bool = True


def _columns(directory: Path) -> _Columns:
    if (bundle := _bundle(directory)) is not None:
        return _Columns(bundle.text_columns, labels_declared=bundle.labels_declared)
    record = read_record(directory)
    if record is None:
        return _Columns()
    return _Columns(record.text_columns, record.label_column, record.labels_declared is not False)


def _bundle(directory: Path) -> Bundle | None:
    """The co-finetuned teachers that ``directory`` is one of."""
    bundle = read_bundle(directory.parent) if is_bundle(directory.parent) else None
    return bundle if bundle is not None and directory.name in bundle.teachers else None


def _opened(directory: Path, *, trust_remote_code: bool) -> Student | Teacher:
    if _bundle(directory) is not None:
        return load_teacher(directory.parent, directory.name, trust_remote_code=trust_remote_code)
    return load_student(directory, trust_remote_code=trust_remote_code)


def _length(directory: Path, opened: Student | Teacher, asked: int | None) -> int:
    """Tokens of a text: ``asked``, or what the model was made for; ModelError for more than its positions."""
    if asked is None:
        return opened.max_length
    model = opened.model
    limit = position_limit(model.encoder if isinstance(model, TeacherModel) else model.network)
    if limit is not None and asked > limit:
        raise ModelError(
            f"max_length is {asked}, but the model '{directory}' has positions for {limit} tokens",
            f"Set --max-length to at most {limit}, or leave it out.",
        )
    return asked
