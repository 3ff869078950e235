"""The tolerance between stored targets and present teacher outputs: padding noise plus the error of the storage format.

A batch is padded to its longest text, and padding changes the last digits of every state. The audit measures by how
much, with some texts alone and in a batch. The storage format knows its own error row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.spec import number_format
from kdcache.codecs.projection import project
from kdcache.codecs.registry import format_of

if TYPE_CHECKING:
    from kdcache.codecs.base import Basis, HiddenBlock, LayerSpec

# relative to the norm of a state: differences between machines and libraries
_FLOOR = {"float32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
_MAX_NOISE = {"float32": 1e-2, "bf16": 0.2, "fp16": 0.1}  # padding that changes more than this is a fault
_MARGIN = 4.0  # times the measured noise
_MARGIN_OF_MEAN = 1.25
_NEARER = 0.75  # of the distance, before another layer or a shift is named


@dataclass(frozen=True)
class Tolerance:
    """Allowed relative change of a state, and of a logit (relative to the larger of 1 and its absolute value)."""

    hidden: float
    logits: float


def tolerance(precision: str, hidden_noise: float, logits_noise: float) -> Tolerance:
    """The tolerance for measured relative changes by padding, which count up to ``max_noise``."""
    floor, most = _FLOOR.get(number_format(precision), _FLOOR["bf16"]), max_noise(precision)
    return Tolerance(floor + _MARGIN * min(hidden_noise, most), floor + _MARGIN * min(logits_noise, most))


def max_noise(precision: str) -> float:
    """The largest relative change of a state or a logit by padding that rounding can explain."""
    return _MAX_NOISE.get(number_format(precision), _MAX_NOISE["bf16"])


def relative_change(rows: np.ndarray, others: np.ndarray) -> float:
    """The largest norm of a row's difference, relative to the norm of the row, [rows, width] each; 0 without rows."""
    norms = np.linalg.norm(rows, axis=1)
    return float((np.linalg.norm(rows - others, axis=1) / np.maximum(norms, 1e-12)).max(initial=0.0))


def logits_change(logits: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Per text, the largest difference of a logit, relative to the larger of 1 and the largest logit."""
    change: np.ndarray = np.abs(logits - others).max(axis=1) / np.maximum(1.0, np.abs(logits).max(axis=1))
    return change


@dataclass(frozen=True)
class Comparison:
    """Rows of one layer: ``error`` between stored and live targets and the ``allowed`` one, float64 [rows] each.

    ``excess`` is the root mean square of the errors in multiples of its expected value: a much finer test than a bound
    on each row. ``fits``: whether the basis was fitted for such states.
    """

    stored: np.ndarray  # float32 [rows, dim]
    basis: Basis
    error: np.ndarray
    allowed: np.ndarray
    excess: float
    fits: bool = True


def compare(live: np.ndarray, block: HiddenBlock, spec: LayerSpec, basis: Basis, allowed_change: float) -> Comparison:
    """Compare ``live`` hidden states, float32 [rows, width], with the stored ``block`` of the same rows."""
    storage, projected = format_of(spec), project(live, basis)
    noise = allowed_change * np.linalg.norm(live.astype(np.float64), axis=1)
    stored, rounding = storage.decode(block, basis), storage.rounding(block, projected, spec, basis)
    error = np.linalg.norm(projected.astype(np.float64) - stored, axis=1)
    usual = max(_MARGIN_OF_MEAN * _rms(rounding.usual) + _rms(noise), 1e-12)
    return Comparison(stored, basis, error, rounding.most + rounding.noise * noise, _rms(error) / usual, rounding.fits)


def looks_like(layer: int, comparison: Comparison, every: Mapping[int, np.ndarray]) -> str:
    """What a wrong layer holds instead, as the end of a sentence; empty if unknown.

    ``every``: live states [rows, width] of all layers of the teacher.
    """
    stored, own = comparison.stored, np.median(comparison.error)
    distances = {k: _distance(project(states, comparison.basis), stored) for k, states in every.items() if k != layer}
    nearest = min(distances, key=lambda k: distances[k], default=layer)
    if distances and distances[nearest] < _NEARER * own:
        return f"; what is stored there is layer {nearest}"
    live = project(every[layer], comparison.basis)
    if len(live) > 1 and min(_distance(live[1:], stored[:-1]), _distance(live[:-1], stored[1:])) < _NEARER * own:
        return "; its rows are shifted by one token"
    return ""


def _distance(rows: np.ndarray, others: np.ndarray) -> float:
    return float(np.median(np.linalg.norm(rows - others, axis=1)))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean())) if len(values) else 0.0
