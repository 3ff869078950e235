"""The logged losses: curves over steps, the scale of each term, and its share of the loss.

Which term drives the training is seen, not guessed.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_BOOKKEEPING = {"stage", "event", "step", "epoch", "steps"}
_WEIGHTS_BY_NAME = ("task", "soft", "hidden")  # keys of distill.weights, and names of terms in kdcache 0.1.0
_SAME = 0.01  # relative difference up to which weighted terms add up to the loss


@dataclass(frozen=True)
class Curve:
    """One logged number over optimizer steps."""

    stage: str
    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


def read_curves(metrics: Path, event: str) -> list[Curve]:
    """Curves of ``metrics.jsonl`` for the lines of one ``event`` ('steps' or 'epoch'), by stage, in the order of
    appearance.

    Evaluations within epochs belong to 'epoch'.
    """
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # a partial line of a killed run
            continue
        if {"evaluation": "epoch"}.get(entry.get("event"), entry.get("event")) != event:
            continue
        for name, value in entry.items():
            if name not in _BOOKKEEPING and isinstance(value, int | float) and math.isfinite(value):
                points.setdefault((str(entry.get("stage", "")), name), []).append((float(entry["step"]), float(value)))
    return [
        Curve(stage, name, tuple(step for step, _ in found), tuple(value for _, value in found))
        for (stage, name), found in points.items()
    ]


def scales(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Per curve: its first and last value, median and largest magnitude."""
    rows = []
    for curve in curves:
        sizes = sorted(abs(value) for value in curve.values)
        rows.append(
            {
                "term": curve.name,
                "first": curve.values[0],
                "last": curve.values[-1],
                "median": sizes[len(sizes) // 2],
                "largest": sizes[-1],
            }
        )
    return rows


def by_stage(curves: Sequence[Curve]) -> Mapping[str, list[Curve]]:
    """Curves grouped by the stage that logged them."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.stage, []).append(curve)
    return groups


@dataclass(frozen=True, eq=False)
class Shares:
    """What each term adds to the loss: ``values`` float64[steps, terms], weighted; ``steps`` int64[steps]."""

    stage: str
    steps: np.ndarray
    terms: tuple[str, ...]
    values: np.ndarray

    def of_all(self) -> dict[str, float]:
        """The share of each term in the sum over all steps; sizes count, so negative terms have a share too."""
        sizes = np.abs(self.values).sum(axis=0)
        whole = float(sizes.sum())
        return {name: float(size) / whole if whole else 0.0 for name, size in zip(self.terms, sizes, strict=True)}


def loss_shares(curves: Sequence[Curve], weights: Mapping[str, float]) -> Shares | None:
    """The weighted terms of a stage's logged steps; None where no term was logged.

    A schedule may switch a term off for a part of the training while it is still logged: of all sets of terms, the one
    is taken whose sum is nearest to the logged loss. ``weights``: by term.
    """
    values = {curve.name: dict(zip(curve.steps, curve.values, strict=True)) for curve in curves}
    terms = tuple(name for name in weights if name in values and weights[name])
    if not terms or "loss" not in values:
        return None
    steps = sorted(step for step in values["loss"] if any(step in values[name] for name in terms))
    found = np.array([[weights[name] * values[name].get(step, 0.0) for name in terms] for step in steps])
    losses = np.array([values["loss"][step] for step in steps])
    if len(steps):
        found *= _switched_on(found, losses)
    return Shares(curves[0].stage, np.array(steps, dtype=np.int64), terms, found.reshape(len(steps), len(terms)))


def _switched_on(found: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """1 or 0 for each term of each step [steps, terms]."""
    every = np.ones_like(found)
    off = np.abs(found.sum(axis=1) - losses) > _SAME * np.maximum(np.abs(losses), 1e-12)
    if not off.any() or found.shape[1] > 8:  # no method has that many; the number of sets doubles with each
        return every
    sets = np.array(list(itertools.product((1.0, 0.0), repeat=found.shape[1])))
    errors = np.abs(found[off] @ sets.T - losses[off][:, None])
    every[off] = sets[errors.argmin(axis=1)]
    return every


def weights_of_terms(results: Mapping[str, Any], stage: str) -> dict[str, float]:
    """The weight of each term of a stage; results of kdcache 0.1.0 have those of the recipe only."""
    recorded = results.get("term_weights")
    if isinstance(recorded, Mapping):
        return dict(recorded.get(stage, {}))
    settings = results.get("settings", {})
    if settings.get("paper"):
        return dict.fromkeys(_WEIGHTS_BY_NAME, 1.0)
    given = settings.get("weights", {})
    return {name: float(given[name]) for name in _WEIGHTS_BY_NAME if name in given}
