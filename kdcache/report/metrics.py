"""Scores of a classifier from its logits: accuracy, macro-F1, Matthews correlation, cross-entropy.

Plain numpy, because scikit-learn takes seconds to import and the formulas are a few lines. Rows with label -1 carry no
label and are left out. Where a score is undefined it is 0: F1 of a class that is neither there nor predicted is left
out of the macro mean, Matthews of a constant prediction is 0.
"""

from __future__ import annotations

import math

import numpy as np


def scores(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """``accuracy``, ``macro_f1``, ``matthews`` and ``loss`` of ``logits`` float[n, C] against ``labels`` int[n].

    Nan without labels.
    """
    labels, logits = np.asarray(labels), np.asarray(logits)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels {labels.shape} and logits {logits.shape} do not belong together; expected [n] and [n, classes]"
        )
    known = labels >= 0
    labels, logits = labels[known], logits[known]
    predictions = logits.argmax(axis=1)
    return {
        "accuracy": accuracy(labels, predictions),
        "macro_f1": macro_f1(labels, predictions),
        "matthews": matthews(labels, predictions),
        "loss": cross_entropy(labels, logits),
    }


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of correctly predicted rows; nan without rows."""
    return float(np.mean(labels == predictions)) if len(labels) else math.nan


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean of the classes' F1 over all classes that occur in labels or predictions; nan without rows."""
    if not len(labels):
        return math.nan
    table = confusion(labels, predictions)
    right = np.diag(table)
    occurring = table.sum(axis=0) + table.sum(axis=1)  # = 2 TP + FP + FN
    there = occurring > 0
    return float(np.mean(2 * right[there] / occurring[there]))


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews correlation in its multi-class form (Gorodkin 2004); 0 where labels or predictions are constant."""
    if not len(labels):
        return math.nan
    table = confusion(labels, predictions).astype(np.float64)
    total, right = table.sum(), np.trace(table)
    true, predicted = table.sum(axis=1), table.sum(axis=0)
    covariance = right * total - true @ predicted
    spread = math.sqrt(total**2 - predicted @ predicted) * math.sqrt(total**2 - true @ true)
    return float(covariance / spread) if spread > 0 else 0.0


def cross_entropy(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean of -log softmax(logits)[label] in nats; nan without rows."""
    if not len(labels):
        return math.nan
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_partition = np.log(np.exp(shifted).sum(axis=1))
    return float(np.mean(log_partition - shifted[np.arange(len(labels)), labels]))


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| of the rows in each of ``bins`` intervals of confidence.

    Averaged by rows. Nan without rows. ``probabilities`` float[n, C], ``labels`` int[n] (Guo et al., arXiv 1706.04599).
    """
    if not len(labels):
        return math.nan
    return confidence_gap(probabilities.argmax(axis=1) == labels, probabilities.max(axis=1), bins)


def confidence_gap(right: np.ndarray, confidence: np.ndarray, bins: int = 15) -> float:
    """The expected calibration error of answers bool[n] given with ``confidence`` float[n]; at least one row."""
    which = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(which, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(right))


def confusion(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Counts int64[C, C]: row = label, column = prediction; C covers both."""
    classes = int(max(labels.max(initial=-1), predictions.max(initial=-1))) + 1
    flat = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def standard_error(score: float, rows: int) -> float:
    """Standard error of an accuracy measured on ``rows`` rows: sqrt(p(1-p)/n)."""
    return math.sqrt(max(score * (1 - score), 0.0) / rows) if rows else math.nan
