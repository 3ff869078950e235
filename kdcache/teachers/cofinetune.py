"""Co-finetuning: teachers are trained together under one shared head and saved as a bundle (MT-BERT, section 3.1).

    kdcache cofinetune RECIPE              all teachers of the recipe
    kdcache cofinetune RECIPE --add NAME   one new teacher against the frozen shared head; other caches stay valid
    kdcache cofinetune RECIPE --folds 5    then five further bundles, each without a fifth of the train rows

Teachers with ``head = "own"`` are fine-tuned already: they are scored and registered, not trained. The same command
continues an interrupted training, and returns at once if the teachers exist. A bundle with other settings or data is
refused, because caches may depend on it.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.spec import check_same_task
from kdcache.data.task import TaskData, load_task
from kdcache.errors import MismatchError, RecipeError
from kdcache.files import remove_leftovers
from kdcache.locks import exclusive
from kdcache.progress import SilentProgress
from kdcache.teachers import joint
from kdcache.teachers.bundle import Bundle, is_bundle, load_shared_head, read_bundle, write_bundle
from kdcache.teachers.fingerprints import fingerprint_tensors
from kdcache.teachers.fold_checks import Folds, check_possible, folds_there, folds_to_make, refuse_other_fold
from kdcache.teachers.folds import (
    assign_folds,
    begin_folds,
    fold_directory,
    folds_complete,
    texts_of_fold,
    without_fold,
)
from kdcache.teachers.placement import Opened, new_models, open_teachers
from kdcache.teachers.registration import fold_logits, folds_record, save_apart, save_teachers, scored
from kdcache.teachers.sources import open_source, under_shared_head
from kdcache.training.checkpoints import identity_changes
from kdcache.training.metrics_log import MetricsLog
from kdcache.training.processes import current
from kdcache.training.seeding import seed_everything
from kdcache.training.trackers import check_trackers, tracked

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe, TeacherSection
    from kdcache.teachers.head import Pooling, SharedHead
    from kdcache.teachers.sources import Source
    from kdcache.teachers.teacher import TeacherModel
    from kdcache.training.processes import Processes


@dataclass(frozen=True)
class CofinetuneResult:
    """Scores are on validation, empty without it. ``best_epoch`` counts from 1; None if nothing was trained.

    ``epochs``: per teacher that was trained, its scores on validation after each epoch; empty for teachers made by
    0.1.0. ``reused``: the teachers existed already, with the same settings and data.
    """

    teachers_dir: Path
    scores: Mapping[str, Mapping[str, float]]
    mean_scores: Mapping[str, float]
    best_epoch: int | None
    epochs: Mapping[str, Sequence[Mapping[str, float]]]
    reused: bool
    folds: Mapping[str, Any] = field(default_factory=dict)  # ``training.folds`` of teachers.json; empty without folds


@dataclass(frozen=True)
class _Job:
    """What both commands share; checkpoints lie in ``place``."""

    recipe: Recipe
    task: TaskData
    teachers: Opened
    teachers_dir: Path
    place: Path
    metrics: MetricsLog
    progress: Progress


def cofinetune(
    recipe: Recipe, teachers_dir: Path, work_dir: Path, *, progress: Progress, metrics: Path | None = None
) -> CofinetuneResult:
    """Train the recipe's teachers together and write them to ``teachers_dir``.

    Checkpoints lie in ``work_dir`` until the teachers are written; losses and scores go to ``metrics``
    (work_dir/metrics.jsonl). Raises RecipeError, DataError, ModelError, NonFiniteError, StorageError; LockedError where
    another process does the same; MismatchError if ``teachers_dir``, or the checkpoint in ``work_dir``, has other
    settings or data.
    """
    if not recipe.teachers:
        raise RecipeError(f"recipe '{recipe.name}' has no teachers", "Add a [[teachers]] table with name and model.")
    processes = current()
    progress = progress if processes.first else SilentProgress()
    with _locked(work_dir, processes):
        existing = read_bundle(teachers_dir) if is_bundle(teachers_dir) else None
        added = existing.training.get("added", {}) if existing else {}
        task = _load(recipe, progress)
        teachers = _open(recipe, task, [section for section in recipe.teachers if section.name not in added])
        log = MetricsLog(metrics or work_dir / "metrics.jsonl", "cofinetune")
        job = _Job(recipe, task, teachers, teachers_dir, work_dir / "joint", log, progress)
        identity = joint.identity(recipe, task, teachers.identities())
        rest = replace(job, place=work_dir, teachers=Opened({}, {}))
        if existing is not None:
            made = _reuse(job, existing, identity, existing.training.get("identity", {}))
        else:
            check_possible(recipe, task, teachers.trained)
            if recipe.cofinetune.folds is not None:
                begin_folds(teachers_dir)
            made = _make(job, identity)
        del job, teachers  # frees the models before others are trained
        if processes.world > 1:  # folds that are asked for were refused
            return made
        return _with_folds(rest, made, _folds_to_make(rest, read_bundle(teachers_dir)))


def add_teacher(
    recipe: Recipe, name: str, teachers_dir: Path, work_dir: Path, *, progress: Progress, metrics: Path | None = None
) -> CofinetuneResult:
    """Train teacher ``name`` of the recipe against the frozen shared head of ``teachers_dir``, and add it there.

    Besides the new teacher, only teachers.json changes. Raises as ``cofinetune``, and MismatchError if the recipe's
    labels or text columns are not those of the bundle, or if folds could not be made as the teachers were.
    """
    section, processes = recipe.teacher(name), current()
    progress = progress if processes.first else SilentProgress()
    with _locked(work_dir, processes):
        bundle = read_bundle(teachers_dir)
        task = _load(recipe, progress)
        cure = "Use the recipe that these teachers were made with, or another --output-dir."
        check_same_task(task, bundle, ("the recipe's data", f"the teachers in '{teachers_dir}'"), cure)
        teachers = _open(recipe, task, [section], bundle.pooling)
        head = load_shared_head(teachers_dir, bundle) if section.head == "shared" else None
        digest = fingerprint_tensors(head.state_dict().items()) if head is not None else None
        log = MetricsLog(metrics or work_dir / "metrics.jsonl", f"add {name}")
        job = _Job(recipe, task, teachers, teachers_dir, work_dir / f"add-{name}", log, progress)
        identity = joint.identity(recipe, task, teachers.identities(), shared_head=digest)
        rest = replace(job, place=work_dir, teachers=Opened({}, {}))
        if name in bundle.teachers:
            made = _reuse(job, bundle, identity, bundle.training.get("added", {}).get(name, {}))
            folds = _folds_to_make(rest, bundle)
        else:
            folds = _folds_to_make(rest, bundle, section)  # refuses before a training of hours
            made = _make_added(job, bundle, head, identity)
        del job, teachers
        return made if processes.world > 1 else _with_folds(rest, made, folds)


def _make(job: _Job, identity: Mapping[str, Any]) -> CofinetuneResult:
    """Train the teachers of ``job`` together under a new shared head, and write the bundle."""
    head, models = new_models(job.teachers, job.recipe.cofinetune, len(job.task.label_names))
    best = _train(job, models, identity)
    bundle = Bundle(job.task.label_names, job.task.text_columns, {})
    if head is not None:
        bundle = replace(bundle, pooling=head.pooling_name, width=head.width, dropout=head.dropout_rate)
    record = {"identity": identity, "best_epoch": best, "added": {}, "labels_declared": job.task.labels_declared}
    bundle = replace(bundle, training=record)
    return _register(job, bundle, head, models, best)


def _make_added(job: _Job, bundle: Bundle, head: SharedHead | None, identity: Mapping[str, Any]) -> CofinetuneResult:
    """Train the one teacher of ``job`` against the frozen ``head``, and add it to the bundle."""
    (name,) = job.teachers.known
    models: dict[str, TeacherModel] = {}
    if head is not None:
        head.requires_grad_(False)
        seed_everything(job.recipe.cofinetune.seed)
        models = under_shared_head(job.teachers.own, head)
    best = _train(job, models, identity)
    added = {**bundle.training.get("added", {}), name: identity}
    bundle = replace(bundle, training={**bundle.training, "added": added})
    return _register(job, bundle, None, models, best)


def _locked(work_dir: Path, processes: Processes) -> AbstractContextManager[None]:
    """The lock of the directory, which the first process holds for all."""
    if not processes.first:
        return nullcontext()
    return exclusive(work_dir / ".lock", busy=lambda: f"another process is training the teachers in '{work_dir}'")


def _with_folds(job: _Job, made: CofinetuneResult, folds: Folds | None) -> CofinetuneResult:
    """Train what is missing of ``folds``; ``made`` with their record. ``job.place`` is that of all trainings."""
    bundle = read_bundle(job.teachers_dir)
    record = folds_there(job.teachers_dir, bundle)
    if record is None and "folds" in bundle.training:  # somebody removed the folds
        rest = {key: value for key, value in bundle.training.items() if key != "folds"}
        bundle = replace(bundle, training=rest)
        write_bundle(job.teachers_dir, bundle)
    if folds is None:
        return made
    if record is None or not folds_complete(job.teachers_dir, folds.trained, record):
        record = _train_folds(job, bundle, folds)
        write_bundle(job.teachers_dir, replace(bundle, training={**bundle.training, "folds": record}))
    return replace(made, folds=record)


def _folds_to_make(job: _Job, bundle: Bundle, newcomer: TeacherSection | None = None) -> Folds | None:
    load = functools.partial(_open, job.recipe, job.task)
    return folds_to_make(job.recipe, job.task, job.teachers_dir, bundle, load, newcomer)


def _train_folds(job: _Job, bundle: Bundle, folds: Folds) -> dict[str, Any]:
    """Train the bundles of all folds, and compute the logits of the texts that each has not seen; their record."""
    count = folds.count
    assigned = assign_folds(job.task.splits["train"], count, job.recipe.cofinetune.seed)
    job.progress.note(
        f"{count} folds: {count - 1} times the steps of the training on all rows, and one pass over the train texts"
    )
    weights: dict[str, list[str]] = {name: [] for name in folds.trained}
    for fold in range(count):
        task = without_fold(job.task, assigned, fold)
        there = _fold_bundle(replace(job, task=task), bundle, fold, folds)
        ids = texts_of_fold(job.task, assigned, fold)
        for name, made_by in fold_logits(job.recipe, job.task, fold_directory(job.teachers_dir, fold), there, ids):
            if name in weights:
                weights[name].append(made_by)
    job.progress.note("the teachers trained on all rows are scored on them, to compare")
    return folds_record(job.recipe, job.task, job.teachers_dir, bundle, weights)


def _fold_bundle(job: _Job, full: Bundle, fold: int, folds: Folds) -> Bundle:
    """The bundle without the rows of ``fold``: trained as ``full`` was, teacher added by teacher added."""
    directory, count = fold_directory(job.teachers_dir, fold), folds.count
    apart = {"data.train": joint.examples_digest(job.task.splits["train"]), "folds": count, "fold": fold + 1}
    own = {name for name, record in full.teachers.items() if record.head == "own"}
    added: Mapping[str, Mapping[str, Any]] = full.training.get("added", {})
    identity = {**full.training["identity"], **apart}
    names = [name for name in full.teachers if name not in own and name not in added]
    there = read_bundle(directory) if is_bundle(directory) else None
    if there is not None:
        refuse_other_fold(directory, there.training["identity"], identity)
    elif names:
        _make(_of_fold(job, names, fold, count), identity)
    for name in (name for name in added if name in folds.trained):
        there = read_bundle(directory)
        head = load_shared_head(directory, there)
        digest = fingerprint_tensors(head.state_dict().items())
        identity = {**added[name], **apart, "shared_head": digest}
        if name in there.teachers:
            refuse_other_fold(directory, there.training["added"][name], identity)
        else:
            _make_added(_of_fold(job, [name], fold, count, there.pooling), there, head, identity)
    return read_bundle(directory)


def _of_fold(job: _Job, names: Sequence[str], fold: int, count: int, pooling: Pooling | None = None) -> _Job:
    """The training of teachers ``names`` without the rows of ``fold``; ``pooling`` for one that is added."""
    where = f"{'cofinetune' if pooling is None else f'add {names[0]}'}, fold {fold + 1} of {count}"
    job.progress.note(where)
    return replace(
        job,
        teachers=_open(job.recipe, job.task, [job.recipe.teacher(name) for name in names], pooling),
        teachers_dir=fold_directory(job.teachers_dir, fold),
        place=job.place / (f"fold-{fold + 1}" if pooling is None else f"fold-{fold + 1}-add-{names[0]}"),
        metrics=MetricsLog(job.metrics.path, where),
    )


def _load(recipe: Recipe, progress: Progress) -> TaskData:
    task = load_task(recipe.data)
    check_trackers(recipe.cofinetune, "cofinetune")
    for line in task.counts.notes():
        progress.note(line)
    return task


def _open(recipe: Recipe, task: TaskData, sections: Sequence[TeacherSection], pooling: Pooling | None = None) -> Opened:
    """The models of ``sections``, for a shared head with ``pooling`` or the recipe's."""
    length, names, columns = recipe.data.max_length, task.label_names, len(task.text_columns)
    declared, pooling = task.labels_declared, pooling or recipe.cofinetune.pooling

    def load(section: TeacherSection) -> Source:
        return open_source(section, length, names, columns, pooling, labels_declared=declared)

    return open_teachers(sections, recipe.cofinetune, load)


def _train(job: _Job, models: Mapping[str, TeacherModel], identity: Mapping[str, Any]) -> int | None:
    """The best epoch; None if every teacher is fine-tuned already."""
    for line in job.teachers.notes():
        job.progress.note(line)
    if not models:
        return None
    settings = job.recipe.cofinetune
    with tracked(job.metrics, settings, name=job.recipe.name, progress=job.progress) as metrics:
        return joint.train(
            settings, job.task, job.teachers, models, identity, job.place, progress=job.progress, metrics=metrics
        )


def _register(
    job: _Job, bundle: Bundle, new_head: SharedHead | None, models: Mapping[str, TeacherModel], best: int | None
) -> CofinetuneResult:
    """Save and score the teachers, write teachers.json, then remove the checkpoints."""
    directory, teachers = job.teachers_dir, job.teachers
    current().from_first(lambda: remove_leftovers(directory))
    if teachers.apart:
        saved = save_apart(directory, bundle, new_head, teachers, models)
    else:
        saved = current().from_first(lambda: save_teachers(directory, bundle, new_head, teachers.sources, models))
    return current().from_first(lambda: _finish(job, saved, best))


def _finish(job: _Job, bundle: Bundle, best: int | None) -> CofinetuneResult:
    """What the first of several processes does when all teachers are saved."""
    trained = list(job.teachers.trained)
    epochs = bundle.training.get("epochs", {}) | joint.scores_by_epoch(job.metrics, trained)
    bundle = replace(bundle, training={**bundle.training, "epochs": epochs})
    bundle = scored(job.teachers_dir, bundle, joint.labelled_rows(job.task, "validation"), job.recipe.trusted())
    write_bundle(job.teachers_dir, bundle)
    shutil.rmtree(job.place, ignore_errors=True)
    job.progress.note(f"teachers {', '.join(job.teachers.known)} written to {job.teachers_dir}")
    return _result(job.teachers_dir, bundle, best, reused=False)


def _reuse(job: _Job, bundle: Bundle, identity: Mapping[str, Any], existing: Mapping[str, Any]) -> CofinetuneResult:
    """The existing teachers; MismatchError if they were not made with ``identity``."""
    newcomers = [name for name in job.teachers.known if name not in bundle.teachers]
    if newcomers:
        raise MismatchError(
            f"'{job.teachers_dir}' holds the teachers {', '.join(bundle.teachers)}, and not {', '.join(newcomers)}",
            f"Train a new teacher against their shared head: kdcache cofinetune RECIPE --add {newcomers[0]}",
        )
    differing = list(identity_changes(existing, identity, joint.newer_keys(identity)))
    if differing:
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise MismatchError(
            f"the teachers in '{job.teachers_dir}' were made with other inputs; what differs: "
            f"{', '.join(differing[:6])}{more}",
            f"Restore these, give another --output-dir, or make the teachers again after: rm -r '{job.teachers_dir}'",
        )
    if current().first:
        shutil.rmtree(job.place, ignore_errors=True)
    return _result(job.teachers_dir, bundle, bundle.training.get("best_epoch"), reused=True)


def _result(teachers_dir: Path, bundle: Bundle, best: int | None, *, reused: bool) -> CofinetuneResult:
    scores = {name: record.scores for name, record in bundle.teachers.items()}
    return CofinetuneResult(teachers_dir, scores, bundle.mean_scores, best, bundle.training.get("epochs", {}), reused)
