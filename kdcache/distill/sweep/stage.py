"""The sweep stage: students that are not there yet are trained, then all of them are compared.

    kdcache sweep RECIPE --cache PATH

Nothing is kept between commands but the students' run directories. ``sweep.json`` and ``sweep.html`` are written from
them at the end, so a sweep that was killed any number of times ends with the table of an undisturbed one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kdcache.distill.sweep.cells import (
    CacheIdentity,
    LoadRecipe,
    RefusedCell,
    SweepCell,
    SweepStudent,
    recipe_value,
    resolve_cells,
    resolve_proposed,
    student,
    students_of,
    value_of,
)
from kdcache.distill.sweep.costs import CacheProvenance, cost_document
from kdcache.distill.sweep.running import Failure, Worker, run_all
from kdcache.distill.sweep.search import Trial, check_search, propose, score_of
from kdcache.errors import DamageError, RecipeError
from kdcache.files import make_directory, remove_file, replace_file
from kdcache.locks import exclusive
from kdcache.methods.registry import check_method
from kdcache.recipe.number_keys import is_known_key
from kdcache.recipe.sweep import CACHE
from kdcache.report.loaded import read_results
from kdcache.report.sweep import CellResults, sweep_document
from kdcache.report.sweep_page import sweep_page

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe, SearchSection, SweepSection
    from kdcache.recipe.sweep import Cell
    from kdcache.runs import RunDirectory

FAILURE = "failure.json"


@dataclass(frozen=True)
class SweepJob:
    """A sweep and what it needs of the command line: how recipes, caches and students are read and made."""

    recipe: Recipe
    run: RunDirectory
    load: LoadRecipe
    identity: CacheIdentity
    provenance: CacheProvenance
    finished: Callable[[SweepStudent], bool]  # whether a student is there, with these inputs
    worker: Worker[SweepStudent]
    progress: Progress
    jobs: int = 1
    threads: int | None = None

    @property
    def section(self) -> SweepSection:
        """The section of the recipe. RecipeError if there is none."""
        if self.recipe.sweep is None:
            raise RecipeError(
                f"recipe '{self.recipe.name}' has no [sweep] section",
                'Add one, such as: [sweep] grid = { "distill.method" = ["kd", "mt-bert"] }',
            )
        return self.recipe.sweep

    @property
    def metric(self) -> str:
        return self.section.select_by or self.recipe.distill.select_by


@dataclass
class _Found:
    """What is known of the students so far."""

    results: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # student's name -> results.json
    failures: dict[str, Failure] = field(default_factory=dict)


def sweep(job: SweepJob, *, train: bool = True) -> dict[str, Any]:
    """Train what is missing, compare all, write ``sweep.json`` and ``sweep.html``; returns the contents of sweep.json.

    ``train=False`` compares the students that are there, and writes nothing. A student that fails is recorded and the
    others go on; so is a proposal of a search that no recipe may have. Raises RecipeError for a section that cannot be
    used, LockedError if another process works on this sweep.
    """
    section, data = job.section, job.recipe.data
    if data.validation is None and not data.validation_fraction:
        raise RecipeError(
            f"a sweep chooses on validation, and recipe '{job.recipe.name}' has none",
            "Set data.validation, or data.validation_fraction = 0.1.",
        )
    cells = resolve_cells(section.settings(), job.load, job.identity)
    methods = [cell.recipe.distill.method for cell in cells]
    if section.search is not None:
        check_search(section.search)
        _check_keys(job, section.search)
        proposed = section.search.space.get("distill.method", [])
        methods += proposed if isinstance(proposed, list) else []
    for method in dict.fromkeys(methods):
        check_method(method)
    if not train:
        return _compared(job, *_all_cells(job, cells, lambda _: None))
    make_directory(job.run.sweep)
    with exclusive(job.run.sweep / ".lock", busy=lambda: f"another process works on the sweep '{job.run.sweep}'"):
        document = _compared(job, *_all_cells(job, cells, lambda students: _train(job, students)))
        replace_file(job.run.sweep / "sweep.json", (json.dumps(document, indent=2) + "\n").encode())
        replace_file(job.run.sweep / "sweep.html", sweep_page(document).encode())
    return document


def _check_keys(job: SweepJob, search: SearchSection) -> None:
    """RecipeError for an unknown key of the search, with which every proposal would fail."""
    for key, values in search.space.items():
        if key != CACHE and not is_known_key(key):
            job.load({key: values[0] if isinstance(values, list) else values.low})


def _all_cells(
    job: SweepJob, cells: Sequence[SweepCell], train: Callable[[list[SweepStudent]], None]
) -> tuple[list[SweepCell | RefusedCell], set[str], _Found]:
    """All cells, those of the search included; the names of the latter; and what is known of their students."""
    section, found = job.section, _Found()
    known: dict[str, SweepCell | RefusedCell] = {cell.name: cell for cell in cells}
    _bring(job, cells, found, train)
    trials: list[Trial] = []
    proposed: set[str] = set()
    while section.search is not None and (batch := propose(section.search, trials)):
        new = [resolve_proposed(values, job.load, job.identity) for values in batch]
        possible = [cell for cell in new if isinstance(cell, SweepCell)]
        _bring(job, possible, found, train)
        trials += [Trial(values, _score(job, cell, found)) for values, cell in zip(batch, new, strict=True)]
        proposed |= {cell.name for cell in new} - {cell.name for cell in cells}
        known |= {cell.name: cell for cell in new if cell.name not in known}
        students = [each.name for cell in possible for each in _students(job, cell)]
        if any(name not in found.results and name not in found.failures for name in students):
            break  # nothing is trained: what comes next depends on these
    return list(known.values()), proposed, found


def _bring(
    job: SweepJob, cells: Iterable[SweepCell], found: _Found, train: Callable[[list[SweepStudent]], None]
) -> None:
    """Train the missing students of ``cells`` and read the results of all."""
    students = [each for each in students_of(list(cells), job.section.seeds, job.run) if each.name not in found.results]
    train([each for each in students if not job.finished(each)])
    for each in students:
        if job.finished(each):
            found.results[each.name] = read_results(each.run)
        elif (failure := _read_failure(each.run)) is not None:
            found.failures[each.name] = failure


def _train(job: SweepJob, students: list[SweepStudent]) -> None:
    unique = list({each.name: each for each in students}.values())
    if not unique:
        return
    job.progress.start("sweep", len(unique), "students")

    def done(each: SweepStudent, failure: Failure | None) -> None:
        if failure is None:
            remove_file(each.run.root / FAILURE)
            score = read_results(each.run)["scores"].get("validation", {}).get(job.metric)
            job.progress.note(f"{each.name}: {job.metric} {score:.4f}" if score is not None else f"{each.name}: done")
        else:
            make_directory(each.run.root)
            replace_file(each.run.root / FAILURE, (json.dumps(asdict(failure)) + "\n").encode())
            job.progress.note(f"{each.name} failed: {failure.message}")
        job.progress.advance(1)

    run_all(unique, job.worker, jobs=job.jobs, threads=job.threads, done=done)
    job.progress.finish()


def _read_failure(run: RunDirectory) -> Failure | None:
    path = run.root / FAILURE
    try:
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DamageError(f"'{path}' is not readable: {error}", "Delete it and run the same command again.") from error


def _score(job: SweepJob, cell: SweepCell | RefusedCell, found: _Found) -> float | None:
    scores = _cell_results(job, cell, found, proposed=True, keys=()).scores(job.metric)
    return score_of(scores, job.section.seeds, lower_is_better=job.metric == "loss")


def _compared(
    job: SweepJob, cells: Sequence[SweepCell | RefusedCell], proposed: set[str], found: _Found
) -> dict[str, Any]:
    keys = _swept_keys(job.section)
    compared = [_cell_results(job, cell, found, proposed=cell.name in proposed, keys=keys) for cell in cells]
    possible = [cell for cell in cells if isinstance(cell, SweepCell)]
    students = {cell.name: [each for each in _students(job, cell) if each.name in found.results] for cell in possible}
    return sweep_document(
        job.recipe.name,
        compared,
        seeds=job.section.seeds,
        metric=job.metric,
        baseline=(possible or cells)[0].name,
        cost=cost_document(students, found.results, job.provenance),
    )


def _cell_results(
    job: SweepJob, cell: SweepCell | RefusedCell, found: _Found, *, proposed: bool, keys: Sequence[str]
) -> CellResults:
    if isinstance(cell, RefusedCell):
        usual = {key: None if key == CACHE else recipe_value(job.recipe, key) for key in keys}
        settings = {key: cell.settings.get(key, value) for key, value in usual.items()}
        return CellResults(cell.name, settings, {}, dict.fromkeys(job.section.seeds, cell.reason), proposed)
    students = dict(zip(job.section.seeds, _students(job, cell), strict=True))
    results = {seed: found.results[each.name] for seed, each in students.items() if each.name in found.results}
    failures = {
        seed: found.failures[each.name].message for seed, each in students.items() if each.name in found.failures
    }
    return CellResults(cell.name, {key: value_of(cell, key) for key in keys}, results, failures, proposed)


def _students(job: SweepJob, cell: SweepCell) -> list[SweepStudent]:
    return [student(cell, seed, job.run) for seed in job.section.seeds]


def _swept_keys(section: SweepSection) -> list[str]:
    tables: list[Cell] = [*section.settings(), {} if section.search is None else dict(section.search.space)]
    return list(dict.fromkeys(key for table in tables for key in table))
