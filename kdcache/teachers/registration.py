"""Saves, fingerprints and scores the teachers of a bundle.

Fingerprints and scores are computed from the saved files, as every later process loads them, not from models in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache.spec import Fingerprints
from kdcache.data.encoding import encode, padding_id
from kdcache.teachers.bundle import (
    Bundle,
    TeacherRecord,
    fingerprints_on_disk,
    load_teacher,
    save_shared_head,
    save_teacher,
)
from kdcache.teachers.joint import MEAN, score_teachers
from kdcache.teachers.teacher import TeacherModel
from kdcache.training.device import default_device
from kdcache.training.predict import predict

if TYPE_CHECKING:
    from kdcache.teachers.head import SharedHead
    from kdcache.teachers.joint import LabelledRows
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
    logits = {}
    for name in bundle.teachers:
        teacher = load_teacher(directory, name, bundle, trust_remote_code=name in trusted)
        encoded = encode(teacher.tokenizer, validation.texts, teacher.max_length)
        logits[name] = predict(teacher.model.to(default_device()), encoded, padding_id(teacher.tokenizer))
    found = score_teachers(logits, validation.labels)
    records = {name: replace(record, scores=found[name]) for name, record in bundle.teachers.items()}
    return replace(bundle, teachers=records, mean_scores=found[MEAN])
