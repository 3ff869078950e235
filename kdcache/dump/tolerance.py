"""How far what is stored may lie from what a teacher says now: padding noise, and what the stored form gives away.

A batch is padded to its longest text, and another padding changes the last digits of every state. How much is measured
on the spot, by running some texts alone and together. The storage format adds what storing takes away, and knows it row
by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdcache.codecs.projection import project
from kdcache.codecs.registry import format_of

if TYPE_CHECKING:
    from kdcache.codecs.base import Basis, HiddenBlock, LayerSpec

_FLOOR = {"float32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}  # other machines and libraries, relative to the norm of a state
_MOST_NOISE = {
    "float32": 1e-2,
    "bf16": 0.2,
    "fp16": 0.1,
}  # a model that padding changes more than this is not run rightly
_MARGIN = 4.0  # times the noise that was measured
_MARGIN_OF_MEAN = 1.25
_NEARER = 0.75  # of the distance, before another layer or another token is named


@dataclass(frozen=True)
class Tolerance:
    """Allowed relative change of a state, and of a logit (relative to the larger of 1 and its size)."""

    hidden: float
    logits: float


def tolerance(precision: str, hidden_noise: float, logits_noise: float) -> Tolerance:
    """From the largest relative changes that padding was seen to make; ``most_noise`` is the most that counts."""
    floor, most = _FLOOR.get(precision, _FLOOR["bf16"]), most_noise(precision)
    return Tolerance(floor + _MARGIN * min(hidden_noise, most), floor + _MARGIN * min(logits_noise, most))


def most_noise(precision: str) -> float:
    """How much padding may change a state or a logit, relative to its size, in a model that is run rightly."""
    return _MOST_NOISE.get(precision, _MOST_NOISE["bf16"])


def relative_change(one: np.ndarray, other: np.ndarray) -> float:
    """The largest norm of a row's difference, relative to that of the row, [rows, width] each; 0 without rows."""
    sizes = np.linalg.norm(one, axis=1)
    return float((np.linalg.norm(one - other, axis=1) / np.maximum(sizes, 1e-12)).max(initial=0.0))


def logits_change(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Per text the largest difference of a logit, relative to the larger of 1 and the largest logit."""
    change: np.ndarray = np.abs(one - other).max(axis=1) / np.maximum(1.0, np.abs(one).max(axis=1))
    return change


@dataclass(frozen=True)
class Comparison:
    """Of rows of one layer: distance between stored and live target, and the largest that is allowed; float64 [rows]
    each.

    ``excess``: root mean square of the distances, as a multiple of what noise and rounding should make of it. Far finer
    than a bound on each row. ``fits``: whether the live states are such as the basis was made for.
    """

    stored: np.ndarray  # float32 [rows, dim]
    basis: Basis
    error: np.ndarray
    allowed: np.ndarray
    excess: float
    fits: bool = True


def compare(live: np.ndarray, block: HiddenBlock, spec: LayerSpec, basis: Basis, allowed_change: float) -> Comparison:
    """``live`` float32 [rows, width] hidden states against the stored ``block`` of the same rows."""
    storage, projected = format_of(spec), project(live, basis)
    noise = allowed_change * np.linalg.norm(live.astype(np.float64), axis=1)
    stored, rounding = storage.decode(block, basis), storage.rounding(block, projected, spec, basis)
    error = np.linalg.norm(projected.astype(np.float64) - stored, axis=1)
    usual = max(_MARGIN_OF_MEAN * _rms(rounding.usual) + _rms(noise), 1e-12)
    return Comparison(stored, basis, error, rounding.most + rounding.noise * noise, _rms(error) / usual, rounding.fits)


def looks_like(layer: int, comparison: Comparison, every: Mapping[int, np.ndarray]) -> str:
    """What a layer that is off holds instead, as the end of a sentence; empty where it is nothing that is known.

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


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.median(np.linalg.norm(one - other, axis=1)))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean())) if len(values) else 0.0
