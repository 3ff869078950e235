"""Cells that are proposed from the results so far: at random, or by Optuna's tree-structured Parzen estimator.

A proposal is a function of the recipe, of its number, and of the results of the batches before. Nothing is stored: a
search that was killed makes the same proposals again, and their students are there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.errors import RecipeError
from kdcache.recipe.number_keys import number_type
from kdcache.recipe.sweep import RangeSection

if TYPE_CHECKING:
    from kdcache.recipe.sweep import Cell, SearchSection

_DIGITS = 4  # of a proposed number: 0.0003127 and not 0.00031274986


@dataclass(frozen=True)
class Trial:
    """A proposed cell and its score, the higher the better; None if a student of it failed."""

    cell: Cell
    score: float | None


def propose(section: SearchSection, trials: Sequence[Trial]) -> list[Cell]:
    """The next batch of cells after ``trials``; empty when the search is complete.

    Raises RecipeError if the sampler is ``tpe`` and Optuna is not installed.
    """
    count = min(section.batch, section.trials - len(trials))
    sampler = {"random": _at_random, "tpe": _by_optuna}[section.sampler]
    return sampler(section, trials, count) if count > 0 else []


def check_search(section: SearchSection) -> None:
    """Raises RecipeError for a search that cannot work, before any student is trained.

    That is one whose sampler needs a package that is not installed, and one with a range between fractions for a key
    of whole numbers.
    """
    for key, values in section.space.items():
        if isinstance(values, RangeSection) and _whole(key, values):
            for name, end in (("low", values.low), ("high", values.high)):
                if end != int(end):
                    raise RecipeError(
                        f"sweep.search.space.{key} has {name} = {end}, and {key} takes whole numbers",
                        f"Give a whole number as {name}.",
                    )
    if section.sampler == "tpe":
        _import_optuna()


def _at_random(section: SearchSection, trials: Sequence[Trial], count: int) -> list[Cell]:
    cells = []
    for number in range(len(trials), len(trials) + count):
        generator = random.Random(_seed(section.seed, number))
        cells.append({key: _draw(generator, key, values) for key, values in section.space.items()})
    return cells


def _draw(generator: random.Random, key: str, values: list[Any] | RangeSection) -> Any:
    if not isinstance(values, RangeSection):
        return values[generator.randrange(len(values))]
    low, high = values.low, values.high
    if _whole(key, values) and not values.log:
        return generator.randint(int(low), int(high))
    drawn = math.exp(generator.uniform(math.log(low), math.log(high))) if values.log else generator.uniform(low, high)
    return _rounded(drawn, key, values)


def _by_optuna(section: SearchSection, trials: Sequence[Trial], count: int) -> list[Cell]:
    optuna = _import_optuna()
    spread = {key: _distribution(optuna, key, values) for key, values in section.space.items()}
    sampler = optuna.samplers.TPESampler(seed=_seed(section.seed, len(trials)), constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        if trial.score is not None:
            told = {key: _told(section.space[key], trial.cell[key]) for key in spread}
            study.add_trial(optuna.trial.create_trial(params=told, distributions=spread, value=trial.score))
    asked = [study.ask(spread).params for _ in range(count)]
    return [{key: _read(key, values, params[key]) for key, values in section.space.items()} for params in asked]


def _distribution(optuna: Any, key: str, values: list[Any] | RangeSection) -> Any:
    if not isinstance(values, RangeSection):
        return optuna.distributions.CategoricalDistribution(range(len(values)))  # by place: values may be lists
    if _whole(key, values):
        return optuna.distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
    return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)


def _told(values: list[Any] | RangeSection, value: Any) -> Any:
    return value if isinstance(values, RangeSection) else values.index(value)


def _read(key: str, values: list[Any] | RangeSection, value: Any) -> Any:
    return _rounded(value, key, values) if isinstance(values, RangeSection) else values[value]


def _rounded(value: float, key: str, values: RangeSection) -> int | float:
    """Few digits, and within the range."""
    if _whole(key, values):
        return min(max(round(value), int(values.low)), int(values.high))
    return min(max(float(f"{value:.{_DIGITS}g}"), values.low), values.high)


def _whole(key: str, values: RangeSection) -> bool:
    """Whether ``key`` takes whole numbers; where its type does not say it, whether both ends are written so."""
    kind = number_type(key)
    if kind is None:
        return isinstance(values.low, int) and isinstance(values.high, int)
    return kind is int


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([seed, number]).encode()).digest()[:4], "little")


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise RecipeError(
            "sweep.search.sampler is \"tpe\", which needs the package 'optuna', and it is not installed",
            "Install the extra: pip install 'kdcache[search]'; or set sweep.search.sampler = \"random\".",
        ) from error
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna


def score_of(scores: Mapping[int, float], seeds: Sequence[int], *, lower_is_better: bool) -> float | None:
    """The mean over all seeds as a score to maximize; None if a seed is missing, or has a score that is not finite."""
    if not all(math.isfinite(scores.get(seed, math.nan)) for seed in seeds):
        return None
    mean = sum(scores[seed] for seed in seeds) / len(seeds)
    return -mean if lower_is_better else mean
