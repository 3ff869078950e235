"""A run as its page needs it: results, predictions, and the texts and facts of its cache, as far as they are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.card import describe
from kdcache.cache.ids import id_array, id_list
from kdcache.cache.reader import open_cache
from kdcache.data.task import read_examples
from kdcache.errors import DamageError, KdcacheError, RecipeError
from kdcache.recipe import load_recipe
from kdcache.report.predictions import SplitPredictions, read_predictions

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.runs import RunDirectory


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """``cache`` is the one that the student learned from, where it lies in the run directory."""

    run: RunDirectory
    results: Mapping[str, Any]
    predictions: Mapping[str, SplitPredictions] = field(default_factory=dict)
    cache: Cache | None = None
    no_cache: str = "the run directory holds no cache"  # why there is none

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.run.root.resolve().name

    @property
    def split(self) -> str:
        """The split that the page is about: test, else validation."""
        return "test" if "test" in self.results.get("scores", {}) else "validation"

    @property
    def rows(self) -> SplitPredictions | None:
        """The predictions on that split."""
        return self.predictions.get(self.split)

    @property
    def labels(self) -> list[str]:
        """The names of the classes."""
        return [str(name) for name in self.results.get("label_names", [])]

    @property
    def title(self) -> str:
        """The student in words."""
        method = self.results.get("method", "distilled")
        return "student without teachers" if method == "fine-tune" else f"student, {method}"

    def texts(self, ids: Sequence[bytes]) -> dict[bytes, str]:
        """The texts of ``ids``, from the cache or the data files, as far as these have them."""
        wanted = list(dict.fromkeys(ids))
        found = _texts_of_cache(self.cache, wanted) if self.cache is not None else {}
        if wanted and len(found) < len(wanted):
            found |= _texts_of_files(self.run.recipe_file, self.split, set(wanted) - found.keys())
        return found


def load_run(run: RunDirectory) -> LoadedRun:
    """Raises RecipeError without results, DamageError for files that are not readable."""
    results = read_results(run)
    cache, reason = cache_of(run, results)
    return LoadedRun(run, results, read_predictions(run.predictions), cache, reason)


def load_baseline(run: RunDirectory) -> LoadedRun | None:
    """The same student without teachers, where it was trained."""
    return load_run(run.baseline) if run.baseline.results.exists() else None


def read_results(run: RunDirectory) -> dict[str, Any]:
    """``results.json`` of a run; RecipeError if it is missing, DamageError if it is unreadable."""
    try:
        document = json.loads(run.results.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(
            f"'{run.root}' holds no results.json", "Name the directory of a finished run: runs/NAME."
        ) from error
    except (OSError, ValueError) as error:
        raise DamageError(f"'{run.results}' is not readable: {error}", "Run the recipe again.") from error
    if not isinstance(document, dict):
        raise DamageError(f"'{run.results}' is not a results file", "Run the recipe again.")
    return document


def cache_facts(cache: Cache) -> dict[str, Any]:
    """What the cache holds, as ``kdcache cache info`` says it, and the share of variance that each layer keeps."""
    facts = describe(cache)
    for name, teacher in facts["teachers"].items():
        for layer, stored in teacher["layers"].items():
            stored["kept"] = _kept(cache, name, int(layer)) if stored["here"] else None
    return facts


def _kept(cache: Cache, teacher: str, layer: int) -> float | None:
    """The share of the variance that the projection of a layer keeps on the sample; None where it is not known."""
    try:
        basis = cache.basis(teacher, layer)
    except KdcacheError:
        return None
    if basis.components is None:
        return 1.0
    whole = basis.total_variance * cache.teachers[teacher].width
    if basis.explained_variance is None or whole <= 0:
        return None
    return min(1.0, float(basis.explained_variance.sum(dtype=np.float64)) / whole)


def cache_of(run: RunDirectory, results: Mapping[str, Any]) -> tuple[Cache | None, str]:
    """The cache of the run, or of the run that this one belongs to, if it is the one of the results; else why not."""
    reason = "the run directory holds no cache"
    for place in dict.fromkeys((run.cache, run.whole.cache, run.root.parent / "cache")):
        if not (place / "manifest.json").exists():
            continue
        try:
            cache = open_cache(place, incomplete=True)
        except KdcacheError as error:
            reason = error.message
            continue
        if results.get("cache_identity") in (None, cache.identity):
            return cache, ""
        reason = f"'{place}' is another cache than the one that the student learned from"
    return None, reason


def _texts_of_cache(cache: Cache, wanted: Sequence[bytes]) -> dict[bytes, str]:
    if not cache.has_text_here:
        return {}
    found: dict[bytes, str] = {}
    try:
        parts, rows = cache.locate(id_array(wanted))
        for part in sorted({int(part) for part in parts if part >= 0}):
            texts = cache.texts(cache.parts[part].name)
            found |= {wanted[place]: _line(texts[rows[place]]) for place in np.flatnonzero(parts == part).tolist()}
    except KdcacheError:  # a part that was not pulled, or is damaged
        return found
    return found


def _texts_of_files(recipe_file: Path, split: str, wanted: set[bytes]) -> dict[bytes, str]:
    """From the data file of the split, as the recipe of the run names it."""
    try:
        data = load_recipe(recipe_file).data
        source = data.test if split == "test" else data.validation or data.train
        if source is None or not Path(source).is_file():
            return {}
        rows = read_examples(source, data.text, None)
    except (KdcacheError, OSError):
        return {}
    ids = id_list(rows.text_ids)
    return {identity: _line(text) for identity, text in zip(ids, rows.texts, strict=True) if identity in wanted}


def _line(text: tuple[str, ...]) -> str:
    return " | ".join(" ".join(column.split()) for column in text)
