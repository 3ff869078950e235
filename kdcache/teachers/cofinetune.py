"""Co-finetuning: teachers are trained together on the task under one shared head, then kept as a bundle (MT-BERT,
section 3.1).

    kdcache cofinetune RECIPE              all teachers of the recipe kdcache cofinetune RECIPE --add NAME   one
    newcomer against the frozen shared head; the others and their caches stay valid

Teachers with ``head = "own"`` are fine-tuned already: they are scored and registered, not trained. The same command
continues where an interrupted one stopped, and returns at once where the teachers are there already; a bundle of other
settings or data is refused, because caches may depend on it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.data.labels import mismatch_cure
from kdcache.data.task import TaskData, load_task
from kdcache.errors import MismatchError, RecipeError
from kdcache.files import remove_leftovers
from kdcache.locks import exclusive
from kdcache.progress import listed_apart
from kdcache.teachers import joint
from kdcache.teachers.bundle import Bundle, is_bundle, load_shared_head, read_bundle, write_bundle
from kdcache.teachers.fingerprints import fingerprint_tensors
from kdcache.teachers.head import Pooling, SharedHead
from kdcache.teachers.registration import save_teachers, scored
from kdcache.teachers.sources import Source, open_source, under_shared_head
from kdcache.training.checkpoints import identity_changes
from kdcache.training.metrics_log import MetricsLog
from kdcache.training.seeding import seed_everything

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe, TeacherSection
    from kdcache.teachers.teacher import TeacherModel


@dataclass(frozen=True)
class CofinetuneResult:
    """Scores are on validation and empty without one. ``best_epoch`` counts from 1; None where nothing was trained.

    ``reused`` says that the teachers were there already, made with the same settings from the same data.
    """

    teachers_dir: Path
    scores: Mapping[str, Mapping[str, float]]
    mean_scores: Mapping[str, float]
    best_epoch: int | None
    reused: bool


@dataclass(frozen=True)
class _Job:
    """What the two commands have in common; checkpoints lie in ``place``, under ``stage`` in the metrics."""

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
    another process does the same; MismatchError where ``teachers_dir``, or the checkpoint in ``work_dir``, was made
    from something else.
    """
    if not recipe.teachers:
        raise RecipeError(f"recipe '{recipe.name}' has no teachers", "Add a [[teachers]] table with name and model.")
    with exclusive(work_dir / ".lock", busy=lambda: f"another process is training the teachers in '{work_dir}'"):
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
        return _register(job, bundle, head, models, best)


def add_teacher(
    recipe: Recipe, name: str, teachers_dir: Path, work_dir: Path, *, progress: Progress, metrics: Path | None = None
) -> CofinetuneResult:
    """Train teacher ``name`` of the recipe against the frozen shared head of ``teachers_dir``, and add it there.

    Nothing else in the directory changes but teachers.json. Raises as ``cofinetune`` does, and MismatchError where the
    recipe's labels or text columns are not those of the bundle.
    """
    section = recipe.teacher(name)
    with exclusive(work_dir / ".lock", busy=lambda: f"another process is training the teachers in '{work_dir}'"):
        bundle = read_bundle(teachers_dir)
        task = _load(recipe, progress)
        _check_same_task(teachers_dir, bundle, task)
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
        return _register(job, bundle, None, models, best)


def _load(recipe: Recipe, progress: Progress) -> TaskData:
    task = load_task(recipe.data)
    for line in task.counts.notes():
        progress.note(line)
    return task


def _open(
    recipe: Recipe, task: TaskData, sections: Sequence[TeacherSection], pooling: Pooling | None = None
) -> dict[str, Source]:
    """The models of ``sections``, for a shared head with ``pooling``, or with that of the recipe."""
    length, names, declared = recipe.data.max_length, task.label_names, task.labels_declared
    columns, pooling = len(task.text_columns), pooling or recipe.cofinetune.pooling
    return {
        section.name: open_source(section, length, names, columns, pooling, labels_declared=declared)
        for section in sections
    }


def _new_models(job: _Job) -> tuple[SharedHead | None, dict[str, TeacherModel]]:
    """A new shared head over the encoders to be trained.

    All that is new is drawn from the recipe's seed, in the recipe's order.
    """
    shared = {name: source for name, source in job.sources.items() if source.section.head == "shared"}
    if not shared:
        return None, {}
    settings = job.recipe.cofinetune
    seed_everything(settings.seed)
    width = settings.width or max(source.width for source in shared.values())
    head = SharedHead(width, len(job.task.label_names), settings.pooling)
    return head, under_shared_head(shared, head)


def _train(job: _Job, models: Mapping[str, TeacherModel], identity: Mapping[str, Any]) -> int | None:
    """The best epoch, None where every teacher is fine-tuned already."""
    for source in job.sources.values():
        if source.note:
            job.progress.note(source.note)
    if not models:
        return None
    trained = {name: job.sources[name] for name in models}
    settings = job.recipe.cofinetune
    return joint.train(
        settings, job.task, trained, models, identity, job.place, progress=job.progress, metrics=job.metrics
    )


def _register(
    job: _Job, bundle: Bundle, new_head: SharedHead | None, models: Mapping[str, TeacherModel], best: int | None
) -> CofinetuneResult:
    """Save and score, then write the record that makes the directory a bundle; only then drop the checkpoints."""
    remove_leftovers(job.teachers_dir)
    bundle = save_teachers(job.teachers_dir, bundle, new_head, job.sources, models)
    bundle = scored(job.teachers_dir, bundle, joint.labelled_rows(job.task, "validation"), job.recipe.trusted())
    write_bundle(job.teachers_dir, bundle)
    shutil.rmtree(job.place, ignore_errors=True)
    job.progress.note(f"teachers {', '.join(job.sources)} written to {job.teachers_dir}")
    return _result(job.teachers_dir, bundle, best, reused=False)


def _reuse(job: _Job, bundle: Bundle, identity: Mapping[str, Any], existing: Mapping[str, Any]) -> CofinetuneResult:
    """The teachers that are there, where they were made with ``identity``; MismatchError where not."""
    newcomers = [name for name in job.sources if name not in bundle.teachers]
    if newcomers:
        raise MismatchError(
            f"'{job.teachers_dir}' holds the teachers {', '.join(bundle.teachers)}, and not {', '.join(newcomers)}",
            f"Train a newcomer against their shared head: kdcache cofinetune RECIPE --add {newcomers[0]}",
        )
    differing = list(identity_changes(existing, identity, joint.newer_keys(identity)))
    if differing:
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise MismatchError(
            f"the teachers in '{job.teachers_dir}' were made from something else; what differs: "
            f"{', '.join(differing[:6])}{more}",
            f"Restore these, give another --output-dir, or make the teachers anew after: rm -r '{job.teachers_dir}'",
        )
    shutil.rmtree(job.place, ignore_errors=True)
    return _result(job.teachers_dir, bundle, bundle.training.get("best_epoch"), reused=True)


def _result(teachers_dir: Path, bundle: Bundle, best: int | None, *, reused: bool) -> CofinetuneResult:
    scores = {name: record.scores for name, record in bundle.teachers.items()}
    return CofinetuneResult(teachers_dir, scores, bundle.mean_scores, best, reused)


def _check_same_task(teachers_dir: Path, bundle: Bundle, task: TaskData) -> None:
    for what, then, now in (
        ("labels", bundle.label_names, task.label_names),
        ("text columns", bundle.text_columns, task.text_columns),
    ):
        if then != now:
            of_data, of_teachers = listed_apart(now, then)
            cure = "Use the recipe that these teachers were made with, or another --output-dir."
            raise MismatchError(
                f"the teachers in '{teachers_dir}' have the {what} {of_teachers}; the recipe's data has {of_data}",
                mismatch_cure(now, then, cure) if what == "labels" else cure,
            )
