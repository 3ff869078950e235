"""Run directories with made-up answers, for the tests of pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.report.metrics import scores
from kdcache.report.predictions import MEAN, Answers, SplitPredictions, write_predictions
from kdcache.runs import RunDirectory

TEACHERS = {"bert": (109_000_000, 21.0, 1.0), "mpnet": (110_000_000, 22.5, 1.6)}


def make_run(
    root: Path, *, classes: int = 2, rows: int = 120, seed: int = 0, method: str = "mt-bert", **changes: Any
) -> RunDirectory:
    """A finished run whose results follow from its answers. ``names``: label names; ``answer``: of every row."""
    run, rng = RunDirectory(root), np.random.default_rng(3)
    run.create()
    names = changes.get("names") or [f"class {number}" for number in range(classes)]
    teachers = {} if method == "fine-tune" else TEACHERS
    splits, found = {}, {name: {} for name in ("student", "mean", *teachers)}
    for split, count in (("validation", rows // 2), ("test", rows)):
        labels = rng.integers(0, changes.get("known", classes) if split == "validation" else classes, count)
        ids = rng.integers(0, 256, (count, 16)).astype(np.uint8)
        logits = {
            name: _logits(labels, classes, skill, np.random.default_rng([7, number]))
            for number, (name, (_, _, skill)) in enumerate(teachers.items())
        }
        student = _logits(labels, classes, 1.2, np.random.default_rng([9, seed]))
        if "answer" in changes:
            student[:, changes["answer"]] += 100
        found["student"][split] = scores(labels, student)
        for name, values in logits.items():
            found[name][split] = scores(labels, values)
        answers = {name: Answers.of_logits(values) for name, values in logits.items()}
        if logits:
            mean = np.mean(list(logits.values()), axis=0)
            found["mean"][split] = scores(labels, mean)
            answers[MEAN] = Answers.of_logits(mean)
        splits[split] = SplitPredictions(ids, labels, student, answers)
    write_predictions(run.predictions, splits)
    document = {
        "name": root.name,
        "method": method,
        "seed": seed,
        "label_names": names,
        "scores": found["student"],
        "teachers": {
            name: {"parameters": size, "latency_ms": speed, "scores": found[name]}
            for name, (size, speed, _) in teachers.items()
        },
        "teachers_mean": {"scores": found["mean"]},
        "student": {"parameters": 22_700_000, "latency_ms": 3.1, "layers": 3},
        "rows": {"validation": rows // 2, "test": rows},
        "settings": {"epochs": 3, "seed": seed, "weights": {"task": 1.0, "soft": 1.0, "hidden": 0.1}},
        "coverage": {"bert": 1.0, "mpnet": 0.82},
        "cache_identity": None if method == "fine-tune" else "ab" * 32,
        "machine": {"device_name": "a CPU", "threads": 2},
    }
    run.results.write_text(json.dumps(document))
    line = {"stage": "distill", "event": "steps", "epoch": 1, "task": 0.5, "soft": 0.5, "hidden": 0.001}
    lines = [{**line, "step": step, "loss": 0.5 + 0.5 + 0.0001} for step in (1, 2, 3)]
    run.metrics.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return run


def _logits(labels: np.ndarray, classes: int, skill: float, rng: np.random.Generator) -> np.ndarray:
    logits = rng.normal(0, 1, (len(labels), classes)).astype(np.float32)
    logits[np.arange(len(labels)), labels] += skill
    return logits
