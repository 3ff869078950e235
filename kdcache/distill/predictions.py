"""The answers of student and teachers to validation and test, which a run keeps; made again where they are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcache.distill.mixture import Mixture
from kdcache.errors import MismatchError, RecipeError
from kdcache.loading.data import StudentData, student_data
from kdcache.loading.examples import join_examples, stored_logits
from kdcache.methods.parts.mixing import mean_probability
from kdcache.recipe import load_recipe
from kdcache.report.loaded import cache_of, read_results
from kdcache.report.predictions import MEAN, WEIGHTED_MEAN, Answers, SplitPredictions, write_predictions
from kdcache.students.save import load_student
from kdcache.students.score import encode_split, split_logits
from kdcache.training.device import default_device

if TYPE_CHECKING:
    from torch import Tensor

    from kdcache.cache.reader import Cache
    from kdcache.progress import Progress
    from kdcache.runs import RunDirectory


def teacher_answers(names: Sequence[str], logits: Tensor, mixture: Mixture | None) -> dict[str, Answers]:
    """What each teacher answers, and their (weighted) mean if there are several; ``logits`` [N, n, C] float32."""
    found = {name: Answers.of_logits(values.numpy()) for name, values in zip(names, logits, strict=True)}
    if mixture is not None:
        return found | {WEIGHTED_MEAN: Answers.of_logits(mixture_logits(mixture, logits.numpy()))}
    if len(names) > 1:
        found[MEAN] = Answers.of_logits(mean_logits(logits))
    return found


def mean_logits(logits: Tensor) -> np.ndarray:
    """The logarithm of the teachers' mean probability, float32 [n, C]."""
    mixed, _ = mean_probability(logits, torch.ones(logits.shape[:2]), 1.0)
    return np.asarray(mixed[0].numpy())


def mixture_logits(mixture: Mixture, logits: np.ndarray) -> np.ndarray:
    """The logarithm of the probabilities of a weighted mixture, float64 [n, C]."""
    return np.asarray(np.log(np.maximum(mixture.probabilities(logits), 1e-300)))


def split_predictions(
    data: StudentData, logits: Mapping[str, np.ndarray], teachers: Mapping[str, Mapping[str, Answers]]
) -> dict[str, SplitPredictions]:
    """The rows that are kept, from the student's logits and the teachers' answers by split."""
    return {
        name: SplitPredictions(data.splits[name].text_ids, data.splits[name].labels, values, teachers.get(name, {}))
        for name, values in logits.items()
    }


def predict_again(run: RunDirectory, progress: Progress) -> None:
    """Let the saved student of a run answer validation and test, and write ``predictions.safetensors``.

    The teachers' answers come from the cache of the run; without it, they are left out. Raises RecipeError for a run
    without recipe or student, DataError for data files that are gone, MismatchError where these have other classes.
    """
    results, recipe = read_results(run), load_recipe(run.recipe_file)
    if not run.student.exists():
        raise RecipeError(f"'{run.root}' holds no student", "Train it again: kdcache distill RECIPE --replace")
    cache, reason = cache_of(run, results)
    names = list(results.get("teachers", {}))
    if names and cache is None:
        progress.note(f"{run.root}: the teachers' answers are left out: {reason}")
    student = load_student(run.student, trust_remote_code=bool(recipe.trusted()))
    data = student_data(recipe.data, cache)
    if tuple(data.label_names) != tuple(student.label_names):
        raise MismatchError(
            f"the data of '{run.root}' have other classes than its student", "Restore the data files of the recipe."
        )
    student.model.to(default_device())
    logits, teachers = {}, {}
    for name in results.get("scores", {}):
        if name in data.splits:
            texts, labels = data.texts_of(name), data.splits[name].labels
            logits[name] = split_logits(student.model, encode_split(student, texts, labels))
            teachers[name] = _stored_answers(cache, data, name, names, results) if cache is not None and names else {}
    write_predictions(run.predictions, split_predictions(data, logits, teachers))
    progress.note(f"{run.root}: answers to {', '.join(logits)} are kept in {run.predictions.name}")


def _stored_answers(
    cache: Cache, data: StudentData, split: str, names: Sequence[str], results: Mapping[str, Any]
) -> dict[str, Answers]:
    """From the logits of the cache; empty where it lacks a text or a teacher."""
    if not set(names) <= set(cache.teachers):
        return {}
    try:
        joined = join_examples(cache, data.examples, (split,))
    except MismatchError:
        return {}
    return teacher_answers(names, torch.from_numpy(stored_logits(cache, names, joined)), _mixture(results, names))


def _mixture(results: Mapping[str, Any], names: Sequence[str]) -> Mixture | None:
    """The weights of the teachers, as results.json records them."""
    recorded = results.get("teacher_mixture")
    if recorded is None:
        return None

    def values(key: str) -> np.ndarray:
        return np.array([recorded[key][name] for name in names])

    classes = values("teacher_class_weights") if "teacher_class_weights" in recorded else None
    return Mixture(values("teacher_weights"), values("teacher_temperatures"), classes)
