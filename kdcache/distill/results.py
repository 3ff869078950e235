"""results.json of a student: what it scores beside its teachers, what it costs, and what it was made from."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcache import __version__
from kdcache.distill.predictions import mean_logits, mixture_logits, teacher_answers
from kdcache.distill.teachers_at_hand import taken_over
from kdcache.errors import MismatchError
from kdcache.report.losses import read_curves, scales
from kdcache.report.metrics import scores
from kdcache.training.processes import current

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.distill.mixture import Mixture
    from kdcache.distill.setup import Training
    from kdcache.distill.teachers_at_hand import TeacherFacts
    from kdcache.loading.data import StudentData
    from kdcache.loading.targets import TargetSource
    from kdcache.report.predictions import Answers
    from kdcache.students.speed import Speed

STAGE = "distill"  # in metrics.jsonl
SCORED = ("validation", "test")
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class TeacherScores:
    """The scores of each teacher, and of their mean probabilities, on each split that has logits."""

    each: Mapping[str, Mapping[str, Mapping[str, float]]]  # teacher -> split -> metric
    mean: Mapping[str, Mapping[str, float]]  # split -> metric
    weighted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # likewise, of their weighted mixture
    answers: Mapping[str, Mapping[str, Answers]] = field(default_factory=dict)  # split -> teacher, and their mean


def teacher_scores(
    source: TargetSource, data: StudentData, mixture: Mixture | None = None, *, missing: str
) -> TeacherScores:
    """The teachers' scores, from the logits of the source; ``missing = "skip"`` leaves out splits that it lacks."""
    each: dict[str, dict[str, Mapping[str, float]]] = {name: {} for name in source.teachers}
    mean: dict[str, Mapping[str, float]] = {}
    weighted: dict[str, Mapping[str, float]] = {}
    answers: dict[str, dict[str, Answers]] = {}
    for split in SCORED if source.teachers else ():
        if split not in data.splits:
            continue
        try:
            logits = source.logits_for(split)
        except MismatchError:
            if missing != "skip":
                raise
            continue
        labels = data.splits[split].labels
        for name, values in zip(source.teachers, logits, strict=True):
            each[name][split] = scores(labels, values.numpy())
        answers[split] = teacher_answers(source.teachers, logits, mixture)
        mean[split] = scores(labels, mean_logits(logits))
        if mixture is not None:
            weighted[split] = scores(labels, mixture_logits(mixture, logits.numpy()))
    return TeacherScores(each, mean, weighted, answers)


@dataclass(frozen=True)
class Measured:
    """The outcome of a training. Times and speeds differ from run to run; ``best_epoch`` counts from 0."""

    scores: Mapping[str, Mapping[str, float]]  # of the student: split -> metric
    teachers: TeacherScores
    facts: Mapping[str, TeacherFacts]  # of every teacher
    speed: Speed  # of the student
    best_epoch: int
    training_seconds: float  # of this process: a resumed training took longer
    seconds: float
    truncated: Mapping[str, float] = field(default_factory=dict)  # split -> share of the texts cut to max_length
    stages: Sequence[Mapping[str, Any]] = ()  # of a training in stages: settings and outcome of each
    term_weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # stage in metrics.jsonl -> term


def build_results(training: Training, measured: Measured, metrics: Path) -> dict[str, Any]:
    """The contents of results.json."""
    recipe, cache, source = training.recipe, training.cache, training.source
    method = training.settings.method
    return {
        "format": 1,
        "name": recipe.name,
        "licence": recipe.licence,
        "method": method.name,
        "method_title": method.title,
        "method_source": method.source,
        "seed": recipe.distill.seed,
        "scores": {split: dict(values) for split, values in measured.scores.items()},
        "teachers": {name: _teacher(own, measured.facts[name]) for name, own in measured.teachers.each.items()},
        "teachers_mean": {"scores": dict(measured.teachers.mean)},
        **_weights(training, measured.teachers),
        "student": _student(training, measured.speed),
        **_data(training),
        "settings": recipe.distill.model_dump(mode="json"),
        "term_weights": {stage: dict(weights) for stage, weights in measured.term_weights.items()},
        "best_epoch": measured.best_epoch + 1,
        **({"stages": list(measured.stages)} if measured.stages else {}),
        "cache_identity": cache.identity if cache is not None else None,
        "targets": training.targets,
        "layer_map": {name: list(layers) for name, layers in source.layer_map.items()},
        "coverage": dict(source.coverage),
        "truncated": {"student": dict(measured.truncated), "teachers": _truncated_by_teachers(cache, source.teachers)},
        "skipped_rows": source.skipped,
        "joined": {join.split: join.as_dict() for join in training.joins},
        "scales": scales([curve for curve in read_curves(metrics, "steps") if curve.stage.startswith(STAGE)]),
        **({"processes": current().world} if current().world > 1 else {}),
        "training_seconds": round(measured.training_seconds, 1),
        "seconds": round(measured.seconds, 1),
        "machine": machine(measured.speed.device),
    }


def _weights(training: Training, teachers: TeacherScores) -> dict[str, Any]:
    """Weights and temperatures of the teachers, and the scores of that mixture; nothing where they are equal."""
    if training.weights is None:
        return {}
    scored = {split: dict(values) for split, values in teachers.weighted.items()}
    return {"teacher_mixture": {**training.weights.record(), "scores": scored}}


def _student(training: Training, speed: Speed) -> dict[str, Any]:
    section, student = training.recipe.require_student(), training.student
    teachers = taken_over(section, training.teachers_dir)
    return {
        "init_from": section.init_from or student.source,
        **({"taken_over": teachers} if teachers else {}),
        "head": section.head,
        "layers": student.model.depth,
        "width": student.model.width,
        "parameters": student.parameters,
        "latency_ms": speed.latency_ms,
        "texts_per_second": speed.texts_per_second,
    }


def _data(training: Training) -> dict[str, Any]:
    data = training.data
    return {
        "text_columns": list(data.text_columns),
        "label_names": list(data.label_names),
        "max_length": training.student.max_length,
        "rows": {name: len(split.labels) for name, split in data.splits.items()},
        "labelled_rows": {name: int((split.labels >= 0).sum()) for name, split in data.splits.items()},
        "empty_rows": dict(data.empty_rows),
        "data_from": data.origin,
    }


def _teacher(by_split: Mapping[str, Mapping[str, float]], facts: TeacherFacts) -> dict[str, Any]:
    measured = {
        "parameters": facts.parameters,
        "latency_ms": facts.latency_ms,
        "texts_per_second": facts.texts_per_second,
        "measured_on": facts.measured_on,
    }
    return {**measured, "scores": {split: dict(values) for split, values in by_split.items()}}


def _truncated_by_teachers(cache: Cache | None, names: Sequence[str]) -> dict[str, float]:
    """Per teacher, the share of the texts cut to its max_length. Caches of kdcache 0.1.0 do not record it."""
    if cache is None:
        return {}
    records = cache.manifest.provenance.get("teachers")
    shares = {}
    for name in names:
        record = records.get(name) if isinstance(records, Mapping) else None
        record = record if isinstance(record, Mapping) else {}
        cut, texts = record.get("texts_truncated"), record.get("texts_run")
        if isinstance(cut, int) and isinstance(texts, int) and 0 <= cut <= texts and texts:
            shares[name] = cut / texts
    return shares


def machine(device: str) -> dict[str, Any]:
    """The device, system and versions that the numbers were measured with."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"kdcache": __version__} | {package: version(package) for package in _PACKAGES},
    }
