"""The distill stage: a recipe and a cache in, a student out.

    kdcache distill RECIPE --cache PATH

    data and cache -> student -> source of batches -> training -> best epoch -> scores -> student/, results.json

No teacher is on the device while the student trains. Killed at any moment, the same command goes on from the last checkpoint
and ends with the same weights (CPU, float32). ``results.json`` is written last: a run that has it is complete.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.files import write_file
from kdcache.distill.data import StudentData, student_data
from kdcache.distill.evaluation import EncodedSplit, encode_split
from kdcache.distill.objective import DistillationModel, ObjectiveSettings, objective_settings
from kdcache.distill.results import SCORED, STAGE, build_results, student_scores_on, teacher_scores
from kdcache.distill.sources import check_teachers, measure_speed, open_source, teachers_beside
from kdcache.distill.student import Student, build_student
from kdcache.distill.student_files import save_student, student_record
from kdcache.distill.trainee import DistillTrainee
from kdcache.report.cards import model_card
from kdcache.runs import RunDirectory
from kdcache.teachers.fingerprints import fingerprint_tensors
from kdcache.training.loop import LoopSettings, train
from kdcache.training.metrics_log import MetricsLog

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.distill.targets import TargetSource
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe


@dataclass(frozen=True)
class DistillResult:
    """``student``: the saved directory; ``results``: the contents of results.json."""

    student: Path
    results: Mapping[str, Any]

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Of the student: split -> metric -> value."""
        found: Mapping[str, Mapping[str, float]] = self.results["scores"]
        return found


def distill(
    recipe: Recipe, cache: Path | None, run_root: Path, *, live_teachers: Path | None = None, progress: Progress
) -> DistillResult:
    """Train the recipe's student and write ``student/``, ``results.json`` and ``metrics.jsonl`` under ``run_root``.

    ``cache`` may be None for methods without teachers. With ``live_teachers``, a teachers directory, targets come from the
    teachers themselves; the cache still says which texts, layers and projections. Raises RecipeError, DataError, ModelError,
    MismatchError (exit 4), DamageError (exit 3), NonFiniteError, StorageError.
    """
    run, started = RunDirectory(run_root), time.perf_counter()
    settings = objective_settings(recipe.distill)
    section = recipe.require_student()
    opened = _open(cache)
    data = student_data(recipe.data, opened)
    teachers_dir = live_teachers or teachers_beside(cache, run_root)
    student = build_student(
        section, data.label_names, max_length=recipe.data.max_length, seed=recipe.distill.seed,
        dropout=recipe.distill.dropout, teachers_dir=teachers_dir,
    )  # fmt: skip
    source = open_source(recipe.distill, settings, data, student, opened, live_teachers)
    facts = {}
    if opened is not None and source.teachers:
        facts = check_teachers(teachers_dir, opened, source.teachers, _some_texts(data))
    said = teacher_scores(source, data, missing=recipe.distill.missing)  # before training: a cache that lacks texts says so now
    if source.skipped:
        progress.note(f"{source.skipped} rows are left out: the cache lacks their texts")
    splits = {
        name: encode_split(student, data.texts_of(name), data.splits[name].labels) for name in SCORED if name in data.splits
    }
    targets = "none" if not source.teachers else "live" if live_teachers else "cache"
    best = _train(recipe, settings, student, data, source, opened, splits.get("validation"), targets, run, progress)
    scores = student_scores_on(student, splits)
    speed = measure_speed(student.model, student.tokenizer, student.max_length, _some_texts(data))
    results = build_results(
        recipe, settings, student, data, source, opened, student_scores=scores, teachers=said, facts=facts, speed=speed,
        best_epoch=best, seconds=time.perf_counter() - started, targets=targets, metrics=run.metrics,
    )  # fmt: skip
    _save(recipe, student, data, settings, results, run)
    return DistillResult(run.student, results)


def _open(cache: Path | None) -> Cache | None:
    if cache is None:
        return None
    from kdcache.cache.reader import open_cache

    return open_cache(cache)


def _some_texts(data: StudentData) -> list[tuple[str, ...]]:
    """What speed is measured on: the first texts of the test split, or of what there is."""
    return data.texts_of(next(name for name in ("test", "validation", "train") if name in data.splits))[:96]


def _train(
    recipe: Recipe,
    settings: ObjectiveSettings,
    student: Student,
    data: StudentData,
    source: TargetSource,
    cache: Cache | None,
    validation: EncodedSplit | None,
    targets: str,
    run: RunDirectory,
    progress: Progress,
) -> int:
    """Train; the student then has the weights of the best epoch (from 0), which is returned."""
    section = recipe.distill
    pairs = {
        (index, layer): (name, own)
        for index, name in enumerate(source.teachers)
        for layer, own in enumerate(source.layer_map.get(name, ()), start=1)
    }
    model = DistillationModel(
        student.model,
        settings,
        source.teachers,
        dims={pair: source.target_dim(*layer) for pair, layer in pairs.items()},
        variances={pair: source.target_variance(*layer) for pair, layer in pairs.items()},
        seed=section.seed,
    )
    identity = _identity(recipe, model, source, data, cache, targets)
    place = run.checkpoints / STAGE
    trainee = DistillTrainee(
        model, source, validation, place / "best", identity, accumulation=section.accumulation, select_by=section.select_by
    )
    loop = replace(LoopSettings.from_section(section, identity), log_steps=1)
    outcome = train(trainee, loop, checkpoints=place, progress=progress, on_metrics=MetricsLog(run.metrics, STAGE))
    trainee.load_best(outcome.best_epoch)
    return outcome.best_epoch


def _identity(
    recipe: Recipe, model: DistillationModel, source: TargetSource, data: StudentData, cache: Cache | None, targets: str
) -> dict[str, Any]:
    """All that the weights depend on besides what the loop knows itself; a checkpoint of another training is refused by it."""
    section = recipe.distill.model_dump(mode="json", exclude={"checkpoint_steps"})
    return {f"distill.{key}": value for key, value in section.items()} | {
        "initial weights": fingerprint_tensors(model.state_dict().items()),
        "data": data.digest(),
        "text columns": list(data.text_columns),
        "cache": cache.identity if cache is not None else None,
        "targets": targets,
        "teachers": list(source.teachers),
        "layers": {name: list(layers) for name, layers in source.layer_map.items()},
    }


def _save(
    recipe: Recipe, student: Student, data: StudentData, settings: ObjectiveSettings, results: dict[str, Any], run: RunDirectory
) -> None:
    record = student_record(
        student, name=recipe.name, method=settings.method.name, text_columns=data.text_columns, label_column=recipe.data.label
    )
    save_student(run.student, student, record, model_card(results))
    write_file(run.results, (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
    shutil.rmtree(run.checkpoints / STAGE, ignore_errors=True)  # the student is safe: nothing is left to continue
