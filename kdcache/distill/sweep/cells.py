"""The cells of a sweep as recipes, and the students of a cell: one per seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.errors import RecipeError
from kdcache.recipe import Recipe
from kdcache.recipe.sweep import CACHE, Cell
from kdcache.recipe.training import FINE_TUNE
from kdcache.runs import RunDirectory, student_digest

LoadRecipe = Callable[[Mapping[str, Any]], Recipe]  # the recipe with these keys changed
CacheIdentity = Callable[[str | None], str]  # of a cache as a cell names it; None: the cache of the sweep


@dataclass(frozen=True)
class SweepCell:
    """One choice of settings. ``recipe`` has them; its seed counts for nothing."""

    digest: str
    recipe: Recipe
    cache: str | None  # as the cell names it; None: the cache of the sweep

    @property
    def name(self) -> str:
        """Short, for tables; the beginning of its students' directories."""
        return self.digest[:12]


@dataclass(frozen=True)
class RefusedCell:
    """Settings that a search proposed and that no recipe may have together: no student can be trained with them."""

    settings: Cell
    reason: str

    @property
    def name(self) -> str:
        """Short, for tables."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class SweepStudent:
    """A student to train: a cell with a seed. Sent to other processes."""

    recipe: Recipe
    run: RunDirectory
    cache: str | None

    @property
    def name(self) -> str:
        return self.run.root.name


def resolve_cells(settings: Iterable[Cell], load: LoadRecipe, identity: CacheIdentity) -> list[SweepCell]:
    """The cells in their order, each once. Raises RecipeError for a key or value that no recipe may have."""
    found: dict[str, SweepCell] = {}
    for given in settings:
        cache = given.get(CACHE)
        recipe = load({key: value for key, value in given.items() if key != CACHE})
        _check_method(recipe, given)
        recipe = recipe.model_copy(update={"sweep": None, "distill": recipe.distill.plain()})
        digest = student_digest(recipe, upstream=identity(cache))
        found.setdefault(digest, SweepCell(digest, recipe, cache))
    return list(found.values())


def resolve_proposed(settings: Cell, load: LoadRecipe, identity: CacheIdentity) -> SweepCell | RefusedCell:
    """The cell of a search's proposal, or why no recipe may have these settings."""
    try:
        return resolve_cells([settings], load, identity)[0]
    except RecipeError as error:
        return RefusedCell(settings, error.message)


def _check_method(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """RecipeError for a method that no stage takes."""
    method, stages = given.get("distill.method"), recipe.distill.stages or ()
    if method not in (None, FINE_TUNE) and stages and all(stage.method is not None for stage in stages):
        raise RecipeError(
            f"distill.method = '{method}' of a sweep's cell changes nothing: each of the {len(stages)} stages has a "
            "method of its own",
            "Vary distill.stages.1.method, or leave method out of the stages.",
        )


def students_of(cells: Sequence[SweepCell], seeds: Sequence[int], run: RunDirectory) -> list[SweepStudent]:
    """The students of these cells, seed by seed, so that every cell has a first result early."""
    return [student(cell, seed, run) for seed in seeds for cell in cells]


def student(cell: SweepCell, seed: int, run: RunDirectory) -> SweepStudent:
    """One student of a cell, in its directory under ``run``."""
    section = cell.recipe.distill.model_copy(update={"seed": seed})
    recipe = cell.recipe.model_copy(update={"distill": section})
    return SweepStudent(recipe, run.of_sweep(cell.digest, seed), cell.cache)


def value_of(cell: SweepCell, key: str) -> Any:
    """What the cell has for a dotted key, its default included; None if it is not set."""
    return cell.cache if key == CACHE else recipe_value(cell.recipe, key)


def recipe_value(recipe: Recipe, key: str) -> Any:
    """What the recipe has for a dotted key, its default included; None if it is not set."""
    value: Any = recipe.model_dump(mode="json")
    steps = [step.strip() for step in key.split(".")]
    while steps:
        if isinstance(value, list):
            value = _entry(value, steps)
        else:
            step = steps.pop(0)
            value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _entry(entries: Sequence[Any], steps: list[str]) -> Any:
    """What comes next of a list, as ``--set`` names it; removes its name, which may contain dots, or its number."""
    for length in range(len(steps), 0, -1):
        for entry in entries:
            if isinstance(entry, Mapping) and entry.get("name") == ".".join(steps[:length]):
                del steps[:length]
                return entry
    number = steps.pop(0)
    place = int(number) - 1 if number.isdecimal() else -1
    return entries[place] if 0 <= place < len(entries) else None
