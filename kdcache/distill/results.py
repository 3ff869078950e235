"""results.json of a student: what it scores beside its teachers, what it costs, and what it was made from."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcache import __version__
from kdcache.distill.mixing import mean_probability
from kdcache.errors import MismatchError
from kdcache.report.curves import read_curves, scales
from kdcache.report.metrics import scores

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.distill.data import StudentData
    from kdcache.distill.evaluation import EncodedSplit
    from kdcache.distill.objective import ObjectiveSettings
    from kdcache.distill.sources import Speed, TeacherFacts
    from kdcache.distill.student import Student
    from kdcache.distill.targets import TargetSource
    from kdcache.recipe import Recipe

STAGE = "distill"  # in metrics.jsonl
SCORED = ("validation", "test")
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class TeacherScores:
    """Per teacher, and of the mean of their probabilities, the scores on each split that the cache has logits of."""

    each: Mapping[str, Mapping[str, Mapping[str, float]]]  # teacher -> split -> metric
    mean: Mapping[str, Mapping[str, float]]  # split -> metric


def teacher_scores(source: TargetSource, data: StudentData, *, missing: str) -> TeacherScores:
    """From the logits of the cache; no teacher runs. With ``missing = "skip"`` a split that the cache lacks is left out."""
    each: dict[str, dict[str, Mapping[str, float]]] = {name: {} for name in source.teachers}
    mean: dict[str, Mapping[str, float]] = {}
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
        mixed, _ = mean_probability(logits, torch.ones(logits.shape[:2]), 1.0)
        mean[split] = scores(labels, mixed[0].numpy())
    return TeacherScores(each, mean)


def build_results(
    recipe: Recipe,
    settings: ObjectiveSettings,
    student: Student,
    data: StudentData,
    source: TargetSource,
    cache: Cache | None,
    *,
    student_scores: Mapping[str, Mapping[str, float]],
    teachers: TeacherScores,
    facts: Mapping[str, TeacherFacts],
    speed: Speed,
    best_epoch: int,
    seconds: float,
    targets: str,
    metrics: Path,
) -> dict[str, Any]:
    """All of it as JSON-able values; numbers that were measured here (latency, seconds) differ from run to run."""
    assert recipe.student is not None
    head = {
        "format": 1,
        "name": recipe.name,
        "licence": recipe.licence,
        "method": settings.method.name,
        "method_title": settings.method.title,
        "method_source": settings.method.source,
        "seed": recipe.distill.seed,
        "scores": {split: dict(values) for split, values in student_scores.items()},
    }
    return head | {
        "teachers": {name: _teacher(found, facts.get(name)) for name, found in teachers.each.items()},
        "teachers_mean": {"scores": dict(teachers.mean)},
        "student": {
            "init_from": recipe.student.init_from or student.source,
            "head": recipe.student.head,
            "layers": student.model.depth,
            "width": student.model.width,
            "parameters": student.parameters,
            "latency_ms": speed.latency_ms,
            "texts_per_second": speed.texts_per_second,
        },
        "text_columns": list(data.text_columns),
        "label_names": list(data.label_names),
        "max_length": student.max_length,
        "rows": {name: len(split.labels) for name, split in data.splits.items()},
        "labelled_rows": {name: int((split.labels >= 0).sum()) for name, split in data.splits.items()},
        "data_from": data.origin,
        "settings": recipe.distill.model_dump(mode="json"),
        "best_epoch": best_epoch + 1,
        "cache_identity": cache.identity if cache is not None else None,
        "targets": targets,
        "layer_map": {name: list(layers) for name, layers in source.layer_map.items()},
        "coverage": dict(source.coverage),
        "skipped_rows": source.skipped,
        "scales": scales([curve for curve in read_curves(metrics, "steps") if curve.stage == STAGE]),
        "seconds": round(seconds, 1),
        "machine": machine(speed.device),
    }


def _teacher(found: Mapping[str, Mapping[str, float]], facts: TeacherFacts | None) -> dict[str, Any]:
    measured: dict[str, Any] = {"parameters": None, "latency_ms": None, "texts_per_second": None}
    if facts is not None:
        speed = facts.speed
        measured = {"parameters": facts.parameters, "latency_ms": speed.latency_ms, "texts_per_second": speed.texts_per_second}
    return {**measured, "scores": {split: dict(values) for split, values in found.items()}}


def machine(device: str) -> dict[str, Any]:
    """Where the numbers were measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"kdcache": __version__} | {package: version(package) for package in _PACKAGES},
    }


def student_scores_on(student: Student, splits: Mapping[str, EncodedSplit]) -> dict[str, dict[str, float]]:
    """Scores on validation and test, those that there are."""
    from kdcache.distill.evaluation import split_scores

    return {name: split_scores(student.model, split) for name, split in splits.items()}
