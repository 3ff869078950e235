"""The distill stage: a recipe and a cache in, a student out.

    kdcache distill RECIPE --cache PATH

    data and cache -> student -> source of batches -> training -> best epoch -> scores -> student/, results.json

No teacher is on the device while the student trains. Killed at any moment, the same command goes on from the last
checkpoint and ends with the same weights (CPU, float32). ``results.json`` is written last: a run that has it is
complete.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.memory import keep_freed_blocks
from kdcache.data.encoding import truncation_note
from kdcache.distill.results import SCORED, STAGE, Measured, build_results, teacher_scores
from kdcache.distill.setup import NEWER_KEYS, Training, prepare
from kdcache.distill.teachers_at_hand import check_teachers
from kdcache.files import write_file
from kdcache.methods.base import Moment
from kdcache.methods.parts.projections import PROJECTIONS, rate_factor
from kdcache.report.cards import model_card
from kdcache.runs import RunDirectory
from kdcache.students.save import save_student, student_record
from kdcache.students.score import EncodedSplit, encode_split, selection_score, split_scores
from kdcache.students.speed import measure_speed
from kdcache.training.best_epoch import BestEpoch
from kdcache.training.durable import remove_directory
from kdcache.training.loop import LoopSettings, default_device, train
from kdcache.training.metrics_log import MetricsLog

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kdcache.cache.reader import Cache
    from kdcache.distill.objective import DistillationModel
    from kdcache.loader.targets import Batch, TargetSource
    from kdcache.progress import Progress
    from kdcache.recipe import DistillSection, Recipe


@dataclass(frozen=True)
class DistillResult:
    """``student``: the saved directory; ``results``: the contents of results.json."""

    student: Path
    results: Mapping[str, Any]

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Of the student: split -> metric -> value."""
        found: Mapping[str, Mapping[str, float]] = self.results["scores"]
        return found


def distill(
    recipe: Recipe, cache: Path | Cache | None, run_root: Path, *, live_teachers: Path | None = None, progress: Progress
) -> DistillResult:
    """Train the recipe's student and write ``student/``, ``results.json`` and ``metrics.jsonl`` under ``run_root``.

    ``cache`` is a directory, or an open cache that is read through from elsewhere; None for methods without teachers.
    With ``live_teachers``, a teachers directory, targets come from the teachers themselves; the cache still says which
    texts, layers and projections. Raises RecipeError, DataError, ModelError, MismatchError (exit 4), DamageError (exit
    3), NonFiniteError, StorageError.
    """
    run, started = RunDirectory(run_root), time.perf_counter()
    training = prepare(recipe, cache, run_root, live_teachers, progress)
    source, student, data = training.source, training.student, training.data
    facts = check_teachers(
        training.teachers_dir, training.cache, source.teachers, training.some_texts(), recipe.trusted()
    )
    said = teacher_scores(
        source, data, missing=recipe.distill.missing
    )  # before training: a cache that lacks texts says so now
    if source.skipped:
        progress.note(f"{source.skipped} rows are left out: the cache lacks their texts")
    splits = {
        name: encode_split(student, data.texts_of(name), data.splits[name].labels)
        for name in SCORED
        if name in data.splits
    }
    for name, split in splits.items():
        cut, rows = split.encoded.truncated_count, len(split.encoded)
        for line in truncation_note(f"student, {name}", cut, rows, student.max_length):
            progress.note(line)
    if default_device().type == "cpu":
        keep_freed_blocks()
    trained = time.perf_counter()
    best = _train(training, splits.get("validation"), run, progress)
    seconds = time.perf_counter() - trained
    scores = {name: split_scores(student.model, split) for name, split in splits.items()}
    speed = measure_speed(student.model, student.tokenizer, student.max_length, training.some_texts())
    truncated = {} if source.truncated is None else {"train": source.truncated}
    truncated |= {
        name: split.encoded.truncated_count / len(split.encoded) for name, split in splits.items() if len(split.encoded)
    }
    taken = time.perf_counter() - started
    measured = Measured(scores, said, facts, speed, best, seconds, taken, truncated)
    results = build_results(training, measured, run.metrics)
    _save(training, results, run, progress)
    return DistillResult(run.student, results)


def _train(training: Training, validation: EncodedSplit | None, run: RunDirectory, progress: Progress) -> int:
    """Train; the student then has the weights of the best epoch (from 0), which is returned."""
    section, place, model = training.recipe.distill, run.checkpoints / STAGE, training.model()
    identity = training.identity(model)
    trainee = DistillTrainee(
        model,
        training.source,
        validation,
        BestEpoch(place / "best", place, identity),
        epochs=section.epochs,
        seed=section.seed,
        accumulation=section.accumulation,
        select_by=section.select_by,
    )
    loop = replace(
        LoopSettings.from_section(section, identity, NEWER_KEYS), log_steps=1, own_rates=_own_rates(section, model)
    )
    outcome = train(trainee, loop, checkpoints=place, progress=progress, on_metrics=MetricsLog(run.metrics, STAGE))
    trainee.load_best(outcome.best_epoch)
    return outcome.best_epoch


def _own_rates(section: DistillSection, model: DistillationModel) -> dict[str, float]:
    """Learning rates of what terms own, by the start of the parameters' names.

    That of the projections is the recipe's to choose, and in the settings of every run: checkpoints are compared on it.
    """
    rates = {f"{name}.": section.learning_rate * owned.rate_factor for name, owned in model.owned.items()}
    projections = section.projection_learning_rate or section.learning_rate * rate_factor(section.paper)
    return rates | {f"{PROJECTIONS}.": projections}


def _save(training: Training, results: dict[str, Any], run: RunDirectory, progress: Progress) -> None:
    recipe = training.recipe
    record = student_record(
        training.student,
        name=recipe.name,
        method=training.settings.method.name,
        text_columns=training.data.text_columns,
        label_column=recipe.data.label,
        labels_declared=training.data.labels_declared,
    )
    lacking = save_student(run.student, training.student, record, model_card(results))
    if lacking:
        progress.note(f"student/ has no model.onnx: {lacking}")
    write_file(run.results, (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
    if (run.checkpoints / STAGE).exists():  # the student is safe: nothing is left to continue
        remove_directory(run.checkpoints / STAGE)  # at once: half a checkpoint would be damage to the next command


@dataclass(frozen=True)
class Step:
    """What one optimizer step learns from, and where in the training it is."""

    batch: Batch
    moment: Moment


class DistillTrainee:
    """``distillation`` holds student and projections; ``best`` keeps the best epoch's student."""

    def __init__(
        self,
        distillation: DistillationModel,
        source: TargetSource,
        validation: EncodedSplit | None,
        best: BestEpoch,
        *,
        epochs: int,
        seed: int = 0,
        accumulation: int = 1,
        select_by: str = "accuracy",
    ) -> None:
        self.model: nn.Module = distillation
        self._distillation = distillation
        self.steps_per_epoch = source.steps_per_epoch
        self._student = distillation.student
        self._source = source
        self._validation = validation
        self._best = best
        self._total_steps, self._seed = epochs * source.steps_per_epoch, seed
        self._accumulation = accumulation
        self._select_by = select_by

    def batches(self, epoch: int, first_step: int) -> Iterator[Step]:
        """One per optimizer step."""
        before = epoch * self.steps_per_epoch
        for step, batch in enumerate(self._source.batches(epoch, first_step), start=before + first_step):
            yield Step(batch, Moment(step, self._total_steps, epoch, self._seed))

    def losses(self, step: Step) -> Iterator[tuple[Tensor, dict[str, float | Tensor]]]:
        """The loss of each micro-batch, divided by the counts of the whole step, and its terms before their weights."""
        device = next(self.model.parameters()).device
        counts = self._distillation.counts([step.batch])
        for piece in step.batch.split(self._accumulation):
            loss, terms = self.model(piece.to(device, non_blocking=True), counts, step.moment)
            yield loss, dict(terms)

    def evaluate(self, epoch: int) -> dict[str, float]:  # noqa: ARG002 - of the protocol
        """Scores on validation; nothing without one, which makes the last epoch the best."""
        if self._validation is None:
            return {}
        found = split_scores(self._student, self._validation)
        return {
            "score": selection_score(found, self._select_by),
            **{f"validation/{name}": value for name, value in found.items()},
        }

    def keep_best(self, epoch: int, metrics: dict[str, float]) -> None:  # noqa: ARG002 - of the protocol
        """Keep the student's weights durably; the projections have served."""
        self._best.keep(epoch, {"student": self._student.state_dict()})

    def settle_best(self, epoch: int) -> None:
        """Only ``epoch`` is needed from here on."""
        self._best.settle(epoch)

    def load_best(self, epoch: int) -> None:
        """Put the weights of ``epoch`` (from 0) back into the student."""
        self._student.load_state_dict(self._best.load(epoch)["student"])
