"""Saves, fingerprints and scores the teachers of a bundle.

Fingerprints and scores are computed from the saved files, as every later process loads them, not from models in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.ids import id_list
from kdcache.cache.spec import Fingerprints
from kdcache.data.encoding import encode, padding_id
from kdcache.errors import NonFiniteError
from kdcache.report.metrics import scores
from kdcache.teachers import joint
from kdcache.teachers.bundle import (
    Bundle,
    TeacherRecord,
    fingerprints_on_disk,
    load_teacher,
    save_shared_head,
    save_teacher,
)
from kdcache.teachers.folds import gather_folds, has_fold_logits, write_fold_logits
from kdcache.teachers.joint import MEAN, score_teachers
from kdcache.teachers.placement import united
from kdcache.teachers.teacher import TeacherModel
from kdcache.training.device import default_device
from kdcache.training.predict import predict
from kdcache.training.processes import current

if TYPE_CHECKING:
    from kdcache.data.task import TaskData
    from kdcache.recipe import Recipe
    from kdcache.teachers.head import SharedHead
    from kdcache.teachers.joint import LabelledRows
    from kdcache.teachers.placement import Opened
    from kdcache.teachers.sources import Source


def save_teachers(
    directory: Path,
    bundle: Bundle,
    new_head: SharedHead | None,
    sources: Mapping[str, Source],
    models: Mapping[str, TeacherModel],
) -> Bundle:
    """Write the directory of every source, and the shared head where it is new; the bundle with their records, not yet
    written.

    Sources that have no model in ``models`` are classifiers with their own head, and are saved as they are.
    """
    if new_head is not None:
        save_shared_head(directory, new_head)
    records = dict(bundle.teachers)
    for name, source in sources.items():
        model = models.get(name) or TeacherModel(source.network, None, None, source.class_order)
        save_teacher(directory, name, model.cpu(), source.tokenizer)
        record = _record(source, model)
        records[name] = replace(record, fingerprints=fingerprints_on_disk(directory, name, record, bundle))
    return replace(bundle, teachers=records)


def save_apart(
    directory: Path,
    bundle: Bundle,
    new_head: SharedHead | None,
    teachers: Opened,
    models: Mapping[str, TeacherModel],
) -> Bundle:
    """``save_teachers`` by processes that hold different teachers: each writes its own, the first one the head."""
    current().from_first(lambda: save_teachers(directory, bundle, new_head, {}, {}))
    saved = save_teachers(directory, bundle, None, teachers.sources, models)
    records = united({name: saved.teachers[name] for name in teachers.sources})
    return replace(bundle, teachers={**bundle.teachers, **{name: records[name] for name in teachers.known}})


def _record(source: Source, model: TeacherModel) -> TeacherRecord:
    section = source.section
    return TeacherRecord(
        head=section.head,
        adapter=model.adapter is not None,
        depth=source.depth,
        width=source.width,
        max_length=source.max_length,
        source=section.model,
        revision=section.revision,
        licence=section.licence,
        fingerprints=Fingerprints("", "", "", ""),  # computed from the files later
        class_order=source.class_order,
        trust_remote_code=section.trust_remote_code,
    )


def scored(directory: Path, bundle: Bundle, validation: LabelledRows | None, trusted: Collection[str] = ()) -> Bundle:
    """The bundle with scores of every teacher and of their mean on validation; one teacher is in memory at a time.

    ``trusted``: names of the teachers whose own Python code may run.
    """
    if validation is None:
        return bundle
    logits = {name: present_logits(directory, name, bundle, validation.texts, trusted) for name in bundle.teachers}
    found = score_teachers(logits, validation.labels)
    records = {name: replace(record, scores=found[name]) for name, record in bundle.teachers.items()}
    return replace(bundle, teachers=records, mean_scores=found[MEAN])


def present_logits(
    directory: Path, name: str, bundle: Bundle, texts: Sequence[tuple[str, ...]], trusted: Collection[str]
) -> np.ndarray:
    """Logits float32[n, classes] of a saved teacher; its weights are freed afterwards."""
    teacher = load_teacher(directory, name, bundle, trust_remote_code=name in trusted)
    encoded = encode(teacher.tokenizer, texts, teacher.max_length)
    return predict(teacher.model.to(default_device()), encoded, padding_id(teacher.tokenizer))


def fold_logits(
    recipe: Recipe, task: TaskData, directory: Path, bundle: Bundle, text_ids: np.ndarray
) -> Iterator[tuple[str, str]]:
    """Write what each teacher of a fold answers on the texts of the fold, uint8[n, 16], unless it is there.

    Yields the name and the fingerprint of each. Raises NonFiniteError.
    """
    texts = [task.texts[one] for one in id_list(text_ids)]
    for name, record in bundle.teachers.items():
        prints = record.fingerprints
        made_by = hashlib.sha256(f"{prints.weights} {prints.head}".encode()).hexdigest()
        if not has_fold_logits(directory, name, text_ids, made_by):
            logits = present_logits(directory, name, bundle, texts, recipe.trusted())
            if not np.isfinite(logits).all():
                raise NonFiniteError(
                    f"teacher '{name}' in '{directory}' gives NaN or infinity",
                    'Train with a smaller cofinetune.learning_rate, or with cofinetune.precision = "float32".',
                )
            write_fold_logits(directory, name, text_ids, logits, made_by)
        yield name, made_by


def folds_record(
    recipe: Recipe, task: TaskData, teachers_dir: Path, bundle: Bundle, weights: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """``training.folds`` of teachers.json: per teacher fingerprints, and its scores on the labelled train rows.

    ``in_fold``: of the teacher that was trained on them. ``out_of_fold``: of the bundles that were not.
    """
    rows = joint.labelled_rows(task, "train")
    assert rows is not None
    examples = task.splits["train"]
    ids, teachers = examples.text_ids[examples.labels >= 0], {}
    for name, made_by in weights.items():
        found = gather_folds(teachers_dir, name, made_by, {})
        trained = present_logits(teachers_dir, name, bundle, rows.texts, recipe.trusted())
        unseen = found.logits[found.places(ids)]
        teachers[name] = {
            **asdict(found.spec),
            "weights": list(made_by),
            "scores": {"in_fold": scores(rows.labels, trained), "out_of_fold": scores(rows.labels, unseen)},
        }
    return {"count": len(made_by), "rows": len(ids), "teachers": teachers}
