"""Co-finetuning: teachers are trained together under one shared head and saved as a bundle (MT-BERT, section 3.1).

    kdcache cofinetune RECIPE              all teachers of the recipe
    kdcache cofinetune RECIPE --add NAME   one new teacher against the frozen shared head; other caches stay valid

Teachers with ``head = "own"`` are fine-tuned already: they are scored and registered, not trained. The same command
continues an interrupted training, and returns at once if the teachers exist. A bundle with other settings or data is
refused, because caches may depend on it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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
from kdcache.teachers.head import Pooling, SharedHead
from kdcache.teachers.registration import save_teachers, scored
from kdcache.teachers.sources import Source, open_source, under_shared_head
from kdcache.training.checkpoints import identity_changes
from kdcache.training.metrics_log import MetricsLog
from kdcache.training.processes import current
from kdcache.training.seeding import seed_everything
from kdcache.training.trackers import check_trackers, tracked

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe, TeacherSection
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


@dataclass(frozen=True)
class _Job:
    """What both commands share; checkpoints lie in ``place``."""

    recipe: Recipe
    task: TaskData
    sources: Mapping[str, Source]
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
        sources = _open(recipe, task, [section for section in recipe.teachers if section.name not in added])
        log = MetricsLog(metrics or work_dir / "metrics.jsonl", "cofinetune")
        job = _Job(recipe, task, sources, teachers_dir, work_dir / "joint", log, progress)
        identity = joint.identity(recipe, task, sources)
        if existing is not None:
            return _reuse(job, existing, identity, existing.training.get("identity", {}))
        head, models = _new_models(job)
        best = _train(job, models, identity)
        bundle = Bundle(task.label_names, task.text_columns, {})
        if head is not None:
            bundle = replace(bundle, pooling=head.pooling_name, width=head.width, dropout=head.dropout_rate)
        bundle = replace(bundle, training={"identity": identity, "best_epoch": best, "added": {}})
        return processes.from_first(lambda: _register(job, bundle, head, models, best))


def add_teacher(
    recipe: Recipe, name: str, teachers_dir: Path, work_dir: Path, *, progress: Progress, metrics: Path | None = None
) -> CofinetuneResult:
    """Train teacher ``name`` of the recipe against the frozen shared head of ``teachers_dir``, and add it there.

    Besides the new teacher, only teachers.json changes. Raises as ``cofinetune``, and MismatchError if the recipe's
    labels or text columns are not those of the bundle.
    """
    section, processes = recipe.teacher(name), current()
    progress = progress if processes.first else SilentProgress()
    with _locked(work_dir, processes):
        bundle = read_bundle(teachers_dir)
        task = _load(recipe, progress)
        cure = "Use the recipe that these teachers were made with, or another --output-dir."
        check_same_task(task, bundle, ("the recipe's data", f"the teachers in '{teachers_dir}'"), cure)
        sources = _open(recipe, task, [section], bundle.pooling)
        head = load_shared_head(teachers_dir, bundle) if section.head == "shared" else None
        digest = fingerprint_tensors(head.state_dict().items()) if head is not None else None
        log = MetricsLog(metrics or work_dir / "metrics.jsonl", f"add {name}")
        job = _Job(recipe, task, sources, teachers_dir, work_dir / f"add-{name}", log, progress)
        identity = joint.identity(recipe, task, sources, shared_head=digest)
        added = bundle.training.get("added", {})
        if name in bundle.teachers:
            return _reuse(job, bundle, identity, added.get(name, {}))
        models: dict[str, TeacherModel] = {}
        if head is not None:
            head.requires_grad_(False)
            seed_everything(recipe.cofinetune.seed)
            models = under_shared_head(sources, head)
        best = _train(job, models, identity)
        bundle = replace(bundle, training={**bundle.training, "added": {**added, name: identity}})
        return processes.from_first(lambda: _register(job, bundle, None, models, best))


def _locked(work_dir: Path, processes: Processes) -> AbstractContextManager[None]:
    """The lock of the directory, which the first process holds for all."""
    if not processes.first:
        return nullcontext()
    return exclusive(work_dir / ".lock", busy=lambda: f"another process is training the teachers in '{work_dir}'")


def _load(recipe: Recipe, progress: Progress) -> TaskData:
    task = load_task(recipe.data)
    check_trackers(recipe.cofinetune, "cofinetune")
    for line in task.counts.notes():
        progress.note(line)
    return task


def _open(
    recipe: Recipe, task: TaskData, sections: Sequence[TeacherSection], pooling: Pooling | None = None
) -> dict[str, Source]:
    """The models of ``sections``, for a shared head with ``pooling`` or the recipe's."""
    length, names, declared = recipe.data.max_length, task.label_names, task.labels_declared
    columns, pooling = len(task.text_columns), pooling or recipe.cofinetune.pooling
    return {
        section.name: open_source(section, length, names, columns, pooling, labels_declared=declared)
        for section in sections
    }


def _new_models(job: _Job) -> tuple[SharedHead | None, dict[str, TeacherModel]]:
    """A new shared head over the encoders to train; new weights are drawn from the recipe's seed, in its order."""
    shared = {name: source for name, source in job.sources.items() if source.section.head == "shared"}
    if not shared:
        return None, {}
    settings = job.recipe.cofinetune
    seed_everything(settings.seed)
    width = settings.width or max(source.width for source in shared.values())
    head = SharedHead(width, len(job.task.label_names), settings.pooling)
    return head, under_shared_head(shared, head)


def _train(job: _Job, models: Mapping[str, TeacherModel], identity: Mapping[str, Any]) -> int | None:
    """The best epoch; None if every teacher is fine-tuned already."""
    for source in job.sources.values():
        if source.note:
            job.progress.note(source.note)
    if not models:
        return None
    trained = {name: job.sources[name] for name in models}
    settings = job.recipe.cofinetune
    with tracked(job.metrics, settings, name=job.recipe.name, progress=job.progress) as metrics:
        return joint.train(
            settings, job.task, trained, models, identity, job.place, progress=job.progress, metrics=metrics
        )


def _register(
    job: _Job, bundle: Bundle, new_head: SharedHead | None, models: Mapping[str, TeacherModel], best: int | None
) -> CofinetuneResult:
    """Save and score the teachers, write teachers.json, then remove the checkpoints."""
    remove_leftovers(job.teachers_dir)
    bundle = save_teachers(job.teachers_dir, bundle, new_head, job.sources, models)
    epochs = bundle.training.get("epochs", {}) | joint.scores_by_epoch(job.metrics, models)
    bundle = replace(bundle, training={**bundle.training, "epochs": epochs})
    bundle = scored(job.teachers_dir, bundle, joint.labelled_rows(job.task, "validation"), job.recipe.trusted())
    write_bundle(job.teachers_dir, bundle)
    shutil.rmtree(job.place, ignore_errors=True)
    job.progress.note(f"teachers {', '.join(job.sources)} written to {job.teachers_dir}")
    return _result(job.teachers_dir, bundle, best, reused=False)


def _reuse(job: _Job, bundle: Bundle, identity: Mapping[str, Any], existing: Mapping[str, Any]) -> CofinetuneResult:
    """The existing teachers; MismatchError if they were not made with ``identity``."""
    newcomers = [name for name in job.sources if name not in bundle.teachers]
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
