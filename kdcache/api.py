"""The stages as functions, for scripts and notebooks: the work, run directory and records of the commands.

    run = kdcache.run("sst2.toml")        # all stages
    run = kdcache.distill("sst2.toml")    # one stage
    run.scores["test"]["accuracy"]

A recipe is a file or a ``Recipe``; ``values`` are its overrides, as ``--set`` on the command line. A stage that is
finished with the same settings is not done again. Progress is shown where the code runs: a text that changes in place
in a notebook, else the lines of the commands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cli import stages
from kdcache.cli.options import RUNS, Job, find_cache
from kdcache.errors import RecipeError
from kdcache.progress import default_progress
from kdcache.recipe import Recipe, load_recipe
from kdcache.recipe.loading import with_values
from kdcache.runs import RunDirectory

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.distill.weigh import Weighing
    from kdcache.dump.stage import DumpReport
    from kdcache.progress import Progress
    from kdcache.teachers.cofinetune import CofinetuneResult

Values = Mapping[str, Any]  # dotted key of the recipe -> value


@dataclass(frozen=True, repr=False)
class Run:
    """A run directory with a finished student, made by ``run``, ``distill`` and ``open_run``.

    Attributes:
        paths: of everything in the directory, such as ``run.paths.student`` and ``run.paths.cache``.
        results: the contents of results.json.
        baseline: those of the same student without teachers; None if it was not trained.
    """

    paths: RunDirectory
    results: Mapping[str, Any]
    baseline: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.paths.root.resolve().name

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Of the student: split -> metric -> value."""
        scores: Mapping[str, Mapping[str, float]] = self.results["scores"]
        return scores

    @property
    def student(self) -> Path:
        """The directory of the student, which transformers loads."""
        return self.paths.student

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """(columns, rows) of the results: teachers, the student without teachers, the student."""
        from kdcache.report.table import result_rows, table

        return table(result_rows(self.results, self.baseline))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: losses of the steps, scores of the epochs."""
        if not self.paths.metrics.exists():
            return []
        return [json.loads(line) for line in self.paths.metrics.read_text(encoding="utf-8").splitlines()]

    def __repr__(self) -> str:
        shown = [
            f"{split} accuracy {values['accuracy']:.4f}"
            for split, values in self.scores.items()
            if "accuracy" in values
        ]
        method = f"method {self.results.get('method')}"
        return f"Run('{self.paths.root}': {'; '.join([method, *shown])})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the table of results, and the remarks under it."""
        import html

        from kdcache.cache.shown import html_rows
        from kdcache.report.same_student import other_settings
        from kdcache.report.table import data_notes, remarks

        alone = self.baseline
        if alone is not None and other_settings(self.paths, self.results, alone):
            alone = None
        notes = [*remarks(self.results, alone), *data_notes(self.results)]
        lines = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
        title = f"<p><b>Run</b> {html.escape(str(self.paths.root))}</p>"
        return f"<div>{title}{html_rows(*self.table())}{lines}</div>"


def open_run(path: str | Path) -> Run:
    """Read the results of a run directory, such as ``runs/sst2``.

    Raises:
        RecipeError: the directory has no results.
        DamageError: they are not readable.
    """
    from kdcache.report.loaded import read_results

    paths = RunDirectory(Path(path))
    alone = read_results(paths.baseline) if paths.baseline.results.exists() else None
    return Run(paths, read_results(paths), alone)


def cofinetune(
    recipe: str | Path | Recipe,
    values: Values | None = None,
    *,
    output_dir: str | Path = RUNS,
    add: str | None = None,
    folds: int | None = None,
    progress: Progress | None = None,
) -> CofinetuneResult:
    """Train the teachers of a recipe together, as ``kdcache cofinetune``.

    Args:
        recipe: a file, or a recipe that was loaded.
        values: overrides, such as ``{"cofinetune.epochs": 2}``.
        output_dir: where the run directory is.
        add: train only this new teacher, against the frozen shared head.
        folds: as ``cofinetune.folds``: train so many further bundles, for out-of-fold logits of the train texts.
        progress: shows the work; ``SilentProgress()`` shows nothing.

    Returns:
        The scores of the teachers, and where they are.

    Raises:
        KdcacheError: one of its classes, as the command.
    """
    if folds is not None:
        values = {**(values or {}), "cofinetune.folds": folds}
    return stages.cofinetune(_job(recipe, values, output_dir, progress), add=add)


def dump_teachers(
    recipe: str | Path | Recipe,
    values: Values | None = None,
    *,
    output_dir: str | Path = RUNS,
    teachers: str | Path | None = None,
    cache: str | Path | None = None,
    repair: bool = False,
    no_text: bool = False,
    progress: Progress | None = None,
) -> DumpReport:
    """Run each teacher once over the data, as ``kdcache dump-teachers``.

    Args:
        recipe: a file, or a recipe that was loaded.
        values: overrides, such as ``{"dump.dim": 64}``.
        output_dir: where the run directory is.
        teachers: their directory, instead of that of the run.
        cache: the cache to write, instead of that of the run.
        repair: verify the cache first, and dump again what is damaged.
        no_text: store text ids and targets, not the texts.
        progress: shows the work.

    Returns:
        What was written; ``kdcache.open_cache(report.cache)`` opens it.

    Raises:
        KdcacheError: one of its classes, as the command.
    """
    job = _job(recipe, values, output_dir, progress, teachers=teachers, cache=cache)
    return stages.dump(job, repair=repair, no_text=no_text)


def distill(
    recipe: str | Path | Recipe,
    values: Values | None = None,
    *,
    output_dir: str | Path = RUNS,
    cache: str | Path | Cache | None = None,
    remote: str | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train the student of a recipe from a cache, as ``kdcache distill``.

    Args:
        recipe: a file, or a recipe that was loaded.
        values: overrides, such as ``{"distill.seed": 1, "name": "sst2-seed1"}``.
        output_dir: where the run directory is.
        cache: a directory, an open cache, or a name on the remote; that of the run if not given.
        remote: the URL of the remote, instead of KDCACHE_REMOTE.
        replace: replace a student that was made with other settings.
        progress: shows the work.

    Returns:
        The run with its results; also where the student was finished before with the same settings.

    Raises:
        KdcacheError: one of its classes, as the command.
    """
    from kdcache.cache.reader import Cache

    found = cache.path if isinstance(cache, Cache) else None if cache is None else find_cache(str(cache), remote)
    job = _job(recipe, values, output_dir, progress)
    if isinstance(found, Path):
        job = Job(job.recipe, job.run, job.teachers, found, job.progress)
    elif found is not None:
        job = Job(job.recipe, job.run, job.teachers, job.cache, job.progress, found)
    job.recipe.require_student()
    if replace or not stages.is_finished(job, "student"):
        stages.distill(job, replace=replace)
    return open_run(job.run.root)


def run(
    recipe: str | Path | Recipe,
    values: Values | None = None,
    *,
    output_dir: str | Path = RUNS,
    baseline: bool = True,
    replace: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Co-finetune, dump and distill, and write the page of the run, as ``kdcache run``.

    Stages that are finished with the same settings are skipped. After an interruption, the same call continues.

    Args:
        recipe: a file, or a recipe that was loaded.
        values: overrides, such as ``{"distill.seed": 1, "name": "sst2-seed1"}``.
        output_dir: where the run directory is.
        baseline: also train the same student without teachers, for comparison.
        replace: replace a student that was made with other settings.
        progress: shows the work.

    Returns:
        The run with its results.

    Raises:
        KdcacheError: one of its classes, as the command.
    """
    from kdcache.report.page import write_page

    job = _job(recipe, values, output_dir, progress)
    stages.run_all(job, baseline_too=baseline, replace=replace)
    write_page(job.run)
    return open_run(job.run.root)


def evaluate(
    model: str | Path | Run,
    data: str | Path,
    *,
    text: Sequence[str] | None = None,
    label: str | None = None,
    labels: Sequence[str] | None = None,
    max_length: int | None = None,
    batch: int = 32,
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """Scores of a model, or of the student of a run, on a file or hub data set; as ``kdcache evaluate``.

    Raises:
        KdcacheError: one of its classes, as the command.
    """
    from kdcache.students.score import evaluate_model

    return evaluate_model(
        model.student if isinstance(model, Run) else model,
        str(data),
        text=text,
        label=label,
        labels=labels,
        max_length=max_length,
        batch=batch,
        trust_remote_code=trust_remote_code,
    )


def weigh(cache: str | Path | Cache, split: str = "validation", *, seed: int = 0) -> Weighing:
    """A temperature and a weight for each teacher of a cache, as ``kdcache weigh``.

    ``settings()`` of the result are keys of ``[distill]``.

    Raises:
        DataError: labels are missing or too few.
        MismatchError: the cache has no such split.
    """
    from kdcache.cache.reader import Cache, open_cache
    from kdcache.distill import weigh as weighing

    opened = cache if isinstance(cache, Cache) else open_cache(cache)
    names = tuple(opened.teachers)
    logits = weighing.labelled_logits(opened, names, split, seed=seed)
    return weighing.weigh(logits, names, opened.task.label_names, split)


def _job(
    recipe: str | Path | Recipe,
    values: Values | None,
    output_dir: str | Path,
    progress: Progress | None,
    *,
    teachers: str | Path | None = None,
    cache: str | Path | None = None,
) -> Job:
    if not isinstance(recipe, (str, Path, Recipe)):
        raise RecipeError(
            f"the recipe is of type {type(recipe).__name__}; a file or a Recipe was expected",
            "Load it with kdcache.load_recipe.",
        )
    loaded = with_values(recipe, values) if isinstance(recipe, Recipe) else load_recipe(recipe, values=values)
    run = RunDirectory(Path(output_dir) / loaded.name)
    places = (run.teachers if teachers is None else Path(teachers), run.cache if cache is None else Path(cache))
    return Job(loaded, run, *places, default_progress() if progress is None else progress)
