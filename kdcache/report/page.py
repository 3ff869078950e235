"""The page of a run: the warnings, then an answer to each question that somebody has about a student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.files import replace_file
from kdcache.report.cautions import cautions
from kdcache.report.html import Page, render
from kdcache.report.loaded import LoadedRun, load_baseline, load_run
from kdcache.report.process import cache_section, run_section, storage_section, training_section
from kdcache.report.quality import (
    MISSING,
    agreement_section,
    cost_section,
    error_section,
    models_of,
    score_section,
)
from kdcache.report.same_student import not_compared, other_settings
from kdcache.report.table import data_notes, verdict

if TYPE_CHECKING:
    from kdcache.runs import RunDirectory


def write_page(run: RunDirectory, path: Path | None = None) -> Path:
    """Write ``report.html`` of a run directory, or ``path``; RecipeError if it has no results, StorageError."""
    target = path or run.report
    replace_file(target, render(page(load_run(run), load_baseline(run))).encode())
    return target


def page(loaded: LoadedRun, baseline: LoadedRun | None) -> Page:
    """The contents of the page."""
    results, split = loaded.results, loaded.split
    other = [] if baseline is None else other_settings(loaded.run, results, baseline.results)
    models = models_of(loaded, baseline)
    notes = data_notes(results)
    cache = cache_section(loaded, notes)
    sections = [
        score_section(models, split, [*(notes if cache is None else []), *_missing(loaded)]),
        cost_section(models, split, results.get("machine", {})),
        error_section(loaded),
        agreement_section(loaded.rows, split),
        training_section(loaded, baseline),
        cache,
        storage_section(loaded.run),
        run_section(loaded),
    ]
    return Page(
        loaded.name,
        [section for section in sections if section is not None],
        cautions(loaded, baseline, [model.name for model in models if not model.fits], compared=not other),
        subtitle=_subtitle(results, split),
        lead="" if baseline is None else not_compared(other) if other else verdict(results, baseline.results),
    )


def _missing(loaded: LoadedRun) -> list[str]:
    """What a run without kept answers lacks, and which command brings it."""
    if loaded.rows is not None:
        return []
    return [
        "Intervals, the confusion matrix, disagreements, agreement and calibration need the answers to each row, which "
        "this run does not have: kdcache 0.1.0 did not keep them. "
        f"{MISSING.format(loaded.run.root)} makes them from the saved student, without training."
    ]


def _subtitle(results: Mapping[str, Any], split: str) -> str:
    rows = results.get("labelled_rows", results.get("rows", {})).get(split)
    teachers = results.get("teachers", {})
    facts = [
        results.get("method_title") or results.get("method"),
        f"{len(teachers)} teacher{'' if len(teachers) == 1 else 's'}",
        f"{len(results['label_names']):,} classes" if results.get("label_names") else "",
        f"{rows:,} rows of {split}" if rows else "",
        f"seed {results['seed']}" if "seed" in results else "",
        f"cache {str(results['cache_identity'])[:12]}" if results.get("cache_identity") else "",
    ]
    return " · ".join(str(fact) for fact in facts if fact)
