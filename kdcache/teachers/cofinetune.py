"""Co-finetuning: teachers are trained together on the task under one shared head, then kept as a bundle (MT-BERT, section 3.1).

    kdcache cofinetune RECIPE              all teachers of the recipe
    kdcache cofinetune RECIPE --add NAME   one newcomer against the frozen shared head; the others and their caches stay valid

Teachers with ``head = "own"`` are fine-tuned already: they are scored and registered, not trained. The same command continues
where an interrupted one stopped, and returns at once where the teachers are there already; a bundle of other settings or
data is refused, because caches may depend on it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.spec import Fingerprints
from kdcache.data.encoding import encode
from kdcache.data.task import TaskData, load_task
from kdcache.errors import MismatchError, RecipeError
from kdcache.teachers import joint
from kdcache.teachers.bundle import (
    Bundle,
    TeacherRecord,
    fingerprints_on_disk,
    is_bundle,
    load_shared_head,
    load_teacher,
    read_bundle,
    save_shared_head,
    save_teacher,
    write_bundle,
)
from kdcache.teachers.fingerprints import fingerprint_tensors
from kdcache.teachers.head import SharedHead
from kdcache.teachers.sources import Source, open_source, under_shared_head
from kdcache.teachers.teacher import TeacherModel
from kdcache.teachers.trainee import MEAN, predict, score_teachers
from kdcache.training.loop import default_device
from kdcache.training.metrics_log import MetricsLog
from kdcache.training.seeding import seed_everything

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe, TeacherSection


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


def cofinetune(
    recipe: Recipe, teachers_dir: Path, work_dir: Path, *, progress: Progress, metrics: Path | None = None
) -> CofinetuneResult:
    """Train the recipe's teachers together and write them to ``teachers_dir``.

    Checkpoints lie in ``work_dir`` until the teachers are written; losses and scores go to ``metrics`` (work_dir/metrics.jsonl).
    Raises RecipeError, DataError, ModelError, NonFiniteError; MismatchError where ``teachers_dir``, or the checkpoint in ``work_dir``,
    was made from something else.
    """
    if not recipe.teachers:
        raise RecipeError(f"recipe '{recipe.name}' has no teachers", "Add a [[teachers]] table with name and model.")
    existing = read_bundle(teachers_dir) if is_bundle(teachers_dir) else None
    added = existing.training.get("added", {}) if existing else {}
    sections = [section for section in recipe.teachers if section.name not in added]
    task = load_task(recipe.data)
    sources = _open(recipe, task, sections)
    place = work_dir / "joint"
    identity = joint.identity(recipe, task, sources)
    if existing is not None:
        return _reuse(teachers_dir, existing, identity, existing.training.get("identity", {}), place)
    head, models = _new_models(recipe, task, sources)
    best = _train(recipe, task, sources, models, identity, place, progress, metrics or work_dir / "metrics.jsonl", "cofinetune")
    if head is not None:
        save_shared_head(teachers_dir, head)
    training = {"identity": identity, "best_epoch": best, "added": {}}
    bundle = Bundle(task.label_names, task.text_columns, {}, training=training)
    if head is not None:
        bundle = replace(bundle, pooling=head.pooling_name, width=head.width, dropout=head.dropout_rate)
    return _register(bundle, task, sources, models, teachers_dir, place, best, progress)


def add_teacher(
    recipe: Recipe, name: str, teachers_dir: Path, work_dir: Path, *, progress: Progress, metrics: Path | None = None
) -> CofinetuneResult:
    """Train teacher ``name`` of the recipe against the frozen shared head of ``teachers_dir``, and add it there.

    Nothing else in the directory changes but teachers.json. Raises as ``cofinetune`` does, and MismatchError where the
    recipe's labels or text columns are not those of the bundle.
    """
    section = recipe.teacher(name)
    bundle = read_bundle(teachers_dir)
    task = load_task(recipe.data)
    _check_same_task(teachers_dir, bundle, task)
    sources = _open(recipe, task, [section])
    head = load_shared_head(teachers_dir, bundle) if section.head == "shared" else None
    digest = fingerprint_tensors(head.state_dict().items()) if head is not None else None
    identity = joint.identity(recipe, task, sources, shared_head=digest)
    place = work_dir / f"add-{name}"
    if name in bundle.teachers:
        return _reuse(teachers_dir, bundle, identity, bundle.training.get("added", {}).get(name, {}), place)
    models: dict[str, TeacherModel] = {}
    if head is not None:
        head.requires_grad_(False)
        seed_everything(recipe.cofinetune.seed)
        models = under_shared_head(sources, head)
    best = _train(recipe, task, sources, models, identity, place, progress, metrics or work_dir / "metrics.jsonl", f"add {name}")
    added = {**bundle.training.get("added", {}), name: identity}
    bundle = replace(bundle, training={**bundle.training, "added": added})
    return _register(bundle, task, sources, models, teachers_dir, place, best, progress)


def _open(recipe: Recipe, task: TaskData, sections: Sequence[TeacherSection]) -> dict[str, Source]:
    return {section.name: open_source(section, recipe.data.max_length, task.label_names) for section in sections}


def _new_models(
    recipe: Recipe, task: TaskData, sources: Mapping[str, Source]
) -> tuple[SharedHead | None, dict[str, TeacherModel]]:
    """A new shared head over the encoders to be trained; all that is new is drawn from the recipe's seed, in the recipe's order."""
    shared = {name: source for name, source in sources.items() if source.section.head == "shared"}
    if not shared:
        return None, {}
    settings = recipe.cofinetune
    seed_everything(settings.seed)
    width = settings.width or max(source.width for source in shared.values())
    head = SharedHead(width, len(task.label_names), settings.pooling)
    return head, under_shared_head(shared, head)


def _train(
    recipe: Recipe,
    task: TaskData,
    sources: Mapping[str, Source],
    models: Mapping[str, TeacherModel],
    identity: Mapping[str, Any],
    place: Path,
    progress: Progress,
    metrics: Path,
    stage: str,
) -> int | None:
    for source in sources.values():
        if source.note:
            progress.note(source.note)
    if not models:
        return None
    trained = {name: sources[name] for name in models}
    log = MetricsLog(metrics, stage)
    return joint.train(recipe.cofinetune, task, trained, models, identity, place, progress=progress, metrics=log)


def _register(
    bundle: Bundle,
    task: TaskData,
    sources: Mapping[str, Source],
    models: Mapping[str, TeacherModel],
    teachers_dir: Path,
    place: Path,
    best: int | None,
    progress: Progress,
) -> CofinetuneResult:
    """Save and score every teacher, then write the record that makes the directory a bundle; only then drop the checkpoints."""
    records = dict(bundle.teachers)
    for name, source in sources.items():
        model = models.get(name) or TeacherModel(source.network, None, None, source.class_order)
        records[name] = _saved(teachers_dir, source, model, bundle)
    found = _validation_scores(teachers_dir, replace(bundle, teachers=records), task)
    records = {name: replace(record, scores=found.get(name, {})) for name, record in records.items()}
    bundle = replace(bundle, teachers=records, mean_scores=found.get(MEAN, {}))
    write_bundle(teachers_dir, bundle)
    shutil.rmtree(place, ignore_errors=True)
    progress.note(f"{len(sources)} teacher{'s' * (len(sources) > 1)} written to {teachers_dir}")
    return _result(teachers_dir, bundle, best, reused=False)


def _saved(teachers_dir: Path, source: Source, model: TeacherModel, bundle: Bundle) -> TeacherRecord:
    """Write the teacher's directory; the fingerprints are those of the files, as every later process will read them."""
    section = source.section
    save_teacher(teachers_dir, section.name, model.cpu(), source.tokenizer)
    record = TeacherRecord(
        head=section.head,
        adapter=model.adapter is not None,
        depth=source.depth,
        width=source.width,
        max_length=source.max_length,
        source=section.model,
        revision=section.revision,
        licence=section.licence,
        fingerprints=Fingerprints("", "", "", ""),  # not known before the files are there
        class_order=source.class_order,
    )
    return replace(record, fingerprints=fingerprints_on_disk(teachers_dir, section.name, record, bundle))


def _validation_scores(teachers_dir: Path, bundle: Bundle, task: TaskData) -> dict[str, dict[str, float]]:
    """Scores by teacher and of their mean, of the saved teachers, one in memory at a time; empty without validation."""
    validation = joint.labelled_rows(task, "validation")
    if validation is None:
        return {}
    logits = {}
    for name in bundle.teachers:
        teacher = load_teacher(teachers_dir, name, bundle)
        encoded = encode(teacher.tokenizer, validation.texts, teacher.max_length)
        logits[name] = predict(teacher.model.to(default_device()), encoded, int(teacher.tokenizer.pad_token_id))
    return score_teachers(logits, validation.labels)


def _reuse(
    teachers_dir: Path, bundle: Bundle, identity: Mapping[str, Any], existing: Mapping[str, Any], place: Path
) -> CofinetuneResult:
    """The teachers that are there, where they were made with ``identity``; MismatchError where not."""
    now = json.loads(json.dumps(identity))
    differing = [key for key in sorted({*now, *existing}) if now.get(key) != existing.get(key)]
    if differing:
        raise MismatchError(
            f"the teachers in '{teachers_dir}' were made with other settings or data; what differs: {', '.join(differing)}",
            f"Restore these, give another --output-dir, or make them anew after: rm -r '{teachers_dir}'. A newcomer: --add NAME.",
        )
    shutil.rmtree(place, ignore_errors=True)
    return _result(teachers_dir, bundle, bundle.training.get("best_epoch"), reused=True)


def _result(teachers_dir: Path, bundle: Bundle, best: int | None, *, reused: bool) -> CofinetuneResult:
    scores = {name: record.scores for name, record in bundle.teachers.items()}
    return CofinetuneResult(teachers_dir, scores, bundle.mean_scores, best, reused)


def _check_same_task(teachers_dir: Path, bundle: Bundle, task: TaskData) -> None:
    for what, then, now in (
        ("labels", bundle.label_names, task.label_names),
        ("text columns", bundle.text_columns, task.text_columns),
    ):
        if then != now:
            raise MismatchError(
                f"the teachers in '{teachers_dir}' have the {what} {', '.join(then)}; the recipe's data has {', '.join(now)}",
                "Use the recipe that these teachers were made with, or another --output-dir.",
            )
