"""Preparation of a training: data, cache, student, teachers and layers, opened and checked before the first step."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kdcache.codecs.projection import Projector, leading
from kdcache.data.encoding import tokenizer_fingerprint
from kdcache.distill.objective import DistillationModel, ObjectiveSettings, objective_settings
from kdcache.distill.target_source import open_source
from kdcache.distill.teacher_weights import TeacherWeights, WeightedTeachers, chosen_weights
from kdcache.distill.teachers_at_hand import teachers_beside
from kdcache.errors import MismatchError, RecipeError
from kdcache.loading.cached import CachedBatches
from kdcache.loading.choice import chosen_window
from kdcache.loading.data import SplitJoin, StudentData, join_counts, student_data, with_rows
from kdcache.loading.examples import TRANSFER, join_examples
from kdcache.progress import format_bytes
from kdcache.recipe.training import ARITHMETIC
from kdcache.report.metrics import scores
from kdcache.students.build import build_student
from kdcache.students.score import selection_score
from kdcache.teachers.fingerprints import fingerprint_tensors, lasting_config

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from kdcache.cache.reader import Cache
    from kdcache.loading.targets import TargetSource
    from kdcache.methods.base import Pair
    from kdcache.progress import Progress
    from kdcache.recipe import DistillSection, Recipe
    from kdcache.students.model import Student


Targets = Literal["cache", "live", "none"]

# Keys of ``Training.identity`` that kdcache 0.1.0 did not record: its checkpoints are compared on the others.
NEWER_KEYS = frozenset(
    (
        "student.tokenizer", "student.token_types", "student.padding", "student.config", "student.network",
        "student.head", "labels", "distill.layer_map", "distill.student_scores",
    )
)  # fmt: skip

_FEW_LABELS = 0.2  # share of the rows
_OPTIONAL = ("teacher_weights", "teacher_temperatures", "teacher_class_weights", "task_mean")


@dataclass(frozen=True)
class Training:
    """A training that is ready to start; the student has its initial weights."""

    recipe: Recipe
    settings: ObjectiveSettings
    data: StudentData
    student: Student
    source: TargetSource
    cache: Cache | None
    targets: Targets
    teachers_dir: Path | None  # of teachers whose files are there
    joins: tuple[SplitJoin, ...] = ()  # how the data join the cache, per split
    weights: TeacherWeights | None = None  # of the teachers; None: equal
    later: tuple[Training, ...] = ()  # the stages after this one, with the same student

    @property
    def stages(self) -> tuple[Training, ...]:
        """Every stage of the training, in order."""
        return (self, *self.later)

    def model(self, before: DistillationModel | None = None) -> DistillationModel:
        """The student with the terms of the recipe's method.

        ``before``: the model of the stage before, which hands on its projections if it has the same method.
        """
        source = self.source

        def pairs(epoch: int) -> dict[Pair, tuple[str, int]]:
            layer_map = source.layers_at(epoch)
            return {
                (index, layer): (name, own)
                for index, name in enumerate(source.teachers)
                for layer, own in enumerate(layer_map.get(name, ()), start=1)
                if own is not None
            }

        @functools.cache
        def variances(epoch: int) -> dict[Pair, float]:
            return {pair: source.target_variance(*layer) for pair, layer in pairs(epoch).items()}

        model = DistillationModel(
            self.student.model,
            self.settings,
            source.teachers,
            dims={pair: source.target_dim(*layer) for pair, layer in pairs(0).items()},
            variances=variances,
            seed=self.recipe.distill.seed,
            scores=self.validation_scores,
            unproject=self.unproject,
            weighted=None if self.weights is None else WeightedTeachers(self.weights.of_used),
        )
        if before is not None and before.settings.method is self.settings.method:
            model.take_over(before)
        return model

    def validation_scores(self) -> tuple[float, ...]:
        """Of each teacher, from its logits, by ``distill.select_by``.

        Raises RecipeError where there is no labelled validation text, MismatchError where the cache lacks their logits.
        """
        method, split = self.settings.method.name, self.data.splits.get("validation")
        if split is None or not (split.labels >= 0).any():
            raise RecipeError(
                f"method '{method}' needs the teachers' validation scores, and the data have no labelled validation "
                "texts",
                "Give data.validation or data.validation_fraction, and dump its texts with kdcache dump-teachers.",
            )
        logits = self.source.logits_for("validation")
        select_by = self.recipe.distill.select_by
        return tuple(selection_score(scores(split.labels, own.numpy()), select_by) for own in logits)

    def unproject(self, pair: Pair, stored: Tensor) -> Tensor:
        """Targets ``[n, dim]`` of a layer pair as hidden states ``[n, width]``, by the basis of the teacher's layer.

        For layer maps that do not change from epoch to epoch.
        """
        return self._projector(pair, stored.device).back(stored)

    @functools.cached_property
    def _projector(self) -> Callable[[Pair, torch.device], Projector]:
        @functools.cache
        def projector(pair: Pair, device: torch.device) -> Projector:
            name = self.source.teachers[pair[0]]
            layer = self.source.layer_map[name][pair[1] - 1]
            assert self.cache is not None
            assert layer is not None
            return Projector(leading(self.cache.basis(name, layer), self.source.target_dim(name, layer)), device)

        return projector

    def identity(self, model: DistillationModel) -> dict[str, Any]:
        """Everything that the weights depend on; the loop refuses a checkpoint with another identity.

        Batches follow from data, cache, batch size, seed, window and ``missing``, which are part of it. The device and
        the versions of libraries are not, since they change only rounding: a training may resume on another machine.
        """
        section = self.recipe.distill.model_dump(
            mode="json", exclude={"checkpoint_steps", "checkpoint_minutes", "trackers"}
        )
        absent = {
            key for key in (*_OPTIONAL, *ARITHMETIC) if section[key] is None
        }  # so that 0.1.0, without these keys, is the same
        section = {key: value for key, value in section.items() if key not in absent}
        weights = {} if self.weights is None else {"teacher mixture": self.weights.record()}
        return (
            weights
            | {f"distill.{key}": value for key, value in section.items()}
            | {
                "initial weights": fingerprint_tensors(model.state_dict().items()),
                "data": self.data.digest(),
                "text columns": list(self.data.text_columns),
                "max_length": self.student.max_length,
                "cache": self.cache.identity if self.cache is not None else None,
                "targets": self.targets,
                "teachers": list(self.source.teachers),
                "layers": {name: list(layers) for name, layers in self.source.layer_map.items()},
                **self._student_identity(),
            }
        )

    def _student_identity(self) -> dict[str, Any]:
        """``NEWER_KEYS``: settings of the student that are no tensors and change what it reads or computes."""
        model, tokenizer = self.student.model, self.student.tokenizer
        head = model.head
        shared = {} if head is None else {"pooling": head.pooling_name, "dropout": head.dropout.p}
        return {
            "student.tokenizer": tokenizer_fingerprint(tokenizer),
            "student.token_types": "token_type_ids" in model.accepted.intersection(tokenizer.model_input_names),
            "student.padding": [tokenizer.pad_token_id, tokenizer.padding_side],
            "student.config": lasting_config(model.config.to_diff_dict()),
            "student.network": type(model.network).__name__,
            "student.head": {"kind": model.head_kind, **shared},
            "labels": list(self.data.label_names),
        }

    def some_texts(self) -> list[tuple[str, ...]]:
        """The texts for measuring speed: the first of the test split, else of validation or train."""
        return self.data.texts_of(next(name for name in ("test", "validation", "train") if name in self.data.splits))[
            :96
        ]


def prepare(
    recipe: Recipe, cache: Path | Cache | None, run_root: Path, live_teachers: Path | None, progress: Progress
) -> Training:
    """Open cache and data, build the student, choose teachers and layers of every stage.

    Raises what ``stage.distill`` raises.
    """
    settings, wanted = [objective_settings(stage) for stage in recipe.distill.in_stages()], recipe.require_student()
    uses_teachers = any(own.method.uses_teachers for own in settings)
    opened = _open(cache)
    recipe = with_window(recipe, opened)
    stages = recipe.distill.in_stages()
    data = student_data(recipe.data, opened)
    for note in data.notes:
        progress.note(note)
    joins = join_counts(data, opened) if uses_teachers else ()
    for line in (line for join in joins for line in join.lines()):
        progress.note(line)
    if opened is not None and uses_teachers:
        _note_logits_only(data, opened, progress)
    teachers_dir = live_teachers or teachers_beside(opened, run_root)
    if uses_teachers:
        _note_few_labels(recipe.distill, data, progress)
    student = build_student(
        wanted,
        data.label_names,
        max_length=recipe.data.max_length,
        seed=recipe.distill.seed,
        dropout=recipe.distill.dropout,
        teachers_dir=teachers_dir,
        labels_declared=data.labels_declared,
    )
    weights = chosen_weights(recipe.distill, data, opened) if opened and uses_teachers else None
    if weights is not None:
        progress.note(weights.line())
    trainings = []
    for stage, own in zip(stages, settings, strict=True):
        rows = with_rows(data, stage.rows)
        section = stage if weights is None else weights.section(stage)
        source = open_source(section, own, rows, student, opened, live_teachers, recipe.trusted())
        targets: Targets = "none" if not source.teachers else "live" if live_teachers else "cache"
        of_stage = recipe.model_copy(update={"distill": stage})
        trainings.append(Training(of_stage, own, data, student, source, opened, targets, teachers_dir, joins, weights))
    windows = [training.source.window_bytes for training in trainings if isinstance(training.source, CachedBatches)]
    _note_memory(max(windows, default=0), progress)
    return replace(trainings[0], later=tuple(trainings[1:]))


def with_window(recipe: Recipe, cache: Cache | None) -> Recipe:
    """``recipe`` with the number of parts that batches are drawn from, which is part of a training's identity."""
    if recipe.distill.window is not None:
        return recipe
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"window": chosen_window(cache)})})


def _note_logits_only(data: StudentData, cache: Cache, progress: Progress) -> None:
    """Say how many transfer texts have no hidden states in the cache."""
    if TRANSFER not in data.splits or not any(spec.layers for spec in cache.teachers.values()):
        return
    count, others = len(data.splits[TRANSFER]), 0
    with contextlib.suppress(MismatchError):  # the cache has none of them, which the training says
        marked = join_examples(cache, data.examples, (TRANSFER,), missing="skip").logits_only
        others = 0 if marked is None else int(np.count_nonzero(marked))
    if others:
        progress.note(f"{others:,} of {count:,} transfer texts are stored with logits only (dump.hidden_transfer)")


def _note_few_labels(section: DistillSection, data: StudentData, progress: Progress) -> None:
    """Say where the few labelled rows of a step weigh as much as all its other rows together."""
    labels = [data.splits[name].labels for name in ("train", TRANSFER) if name in data.splits]
    labelled, rows = sum(int(np.count_nonzero(own >= 0)) for own in labels), sum(map(len, labels))
    if section.task_mean is None and not section.stages and section.weights.task and 0 < labelled < rows * _FEW_LABELS:
        progress.note(
            f"{labelled:,} of {rows:,} rows have a label, and the task loss is the mean over these: one of them weighs "
            f'as much as {rows / labelled:.0f} others; distill.task_mean = "rows" weighs all alike'
        )


def _note_memory(needed: int, progress: Progress) -> None:
    """Warn before the first step if the window may not fit into memory: the system would kill the run."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > installed / 2:
        progress.note(
            f"the window holds up to {format_bytes(needed)} of hidden states at once, of {format_bytes(installed)} of "
            "memory in all: a smaller distill.window needs less"
        )


def _open(cache: Path | Cache | None) -> Cache | None:
    from kdcache.cache.reader import open_cache

    return open_cache(cache) if isinstance(cache, Path) else cache
