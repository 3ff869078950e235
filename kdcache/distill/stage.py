"""The distill stage: a recipe and a cache in, a student out.

    kdcache distill RECIPE --cache PATH

    data and cache -> student -> source of batches -> training -> best epoch -> scores -> student/, results.json

No teacher is on the device while the student trains. If the command is killed, the same command resumes from the last
checkpoint and ends with the same weights (CPU, float32). ``results.json`` is written last: a run that has it is
complete.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.memory import keep_freed_blocks
from kdcache.distill.predictions import split_predictions
from kdcache.distill.results import STAGE, Measured, build_results, teacher_scores
from kdcache.distill.scored import encoded_splits, final_logits, finite_logits, truncated
from kdcache.distill.setup import NEWER_KEYS, Training, prepare, with_window
from kdcache.distill.teachers_at_hand import teacher_facts
from kdcache.files import remove_directory, write_file
from kdcache.loading.cached import CachedBatches
from kdcache.loading.live import LiveBatches
from kdcache.loading.transfer import on_device
from kdcache.methods.base import Moment, StepCounts
from kdcache.methods.parts.projections import PROJECTIONS, rate_factor
from kdcache.progress import SilentProgress
from kdcache.report.cards import model_card
from kdcache.report.metrics import scores
from kdcache.report.predictions import write_predictions
from kdcache.runs import RunDirectory
from kdcache.students.save import save_student, student_record
from kdcache.students.score import selection_score
from kdcache.students.speed import measure_speed
from kdcache.teachers.network import takes_full_mask
from kdcache.training import processes as together
from kdcache.training.best_epoch import BestEpoch
from kdcache.training.compiled import compiled
from kdcache.training.device import default_device
from kdcache.training.loop import Outcome, micro_batches, train
from kdcache.training.metrics_log import MetricsLog
from kdcache.training.settings import LoopSettings, check_evaluation
from kdcache.training.trackers import check_trackers, tracked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kdcache.cache.reader import Cache
    from kdcache.distill.objective import DistillationModel
    from kdcache.loading.targets import Batch, TargetSource
    from kdcache.progress import Progress
    from kdcache.recipe import DistillSection, Recipe
    from kdcache.students.score import EncodedSplit
    from kdcache.training.processes import Processes


@dataclass(frozen=True)
class DistillResult:
    """``student``: the saved directory; ``results``: the contents of results.json."""

    student: Path
    results: Mapping[str, Any]

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Of the student: split -> metric -> value."""
        scores: Mapping[str, Mapping[str, float]] = self.results["scores"]
        return scores


def distill(
    recipe: Recipe, cache: Path | Cache | None, run_root: Path, *, live_teachers: Path | None = None, progress: Progress
) -> DistillResult:
    """Train the recipe's student and write ``student/``, ``results.json`` and ``metrics.jsonl`` under ``run_root``.

    Args:
        recipe: what to train, on which data, with which method.
        cache: a directory, or an open cache that is read through from elsewhere; None for methods without teachers.
        run_root: the directory of the run; a training that was killed there goes on.
        live_teachers: a teachers directory. Targets then come from forward passes of these teachers; the cache still
            gives texts, layers and projections.
        progress: is told what happens.

    Raises:
        RecipeError: the recipe asks for something that is not possible.
        DataError: the data files are not usable.
        ModelError: the student cannot be built.
        MismatchError: data, cache and teachers do not belong together.
        DamageError: the cache or a checkpoint is damaged.
        NonFiniteError: the loss, or an output of the student on a split that is scored, is not finite.
        StorageError: a file cannot be written.
    """
    run, started, processes = RunDirectory(run_root), time.perf_counter(), together.current()
    if not processes.first:
        return _help(prepare(recipe, cache, run_root, live_teachers, SilentProgress()), run, processes)
    check_trackers(recipe.distill, "distill")
    prepared = prepare(recipe, cache, run_root, live_teachers, progress)
    shown = next((stage for stage in prepared.stages if stage.source.teachers), prepared)
    training = replace(shown, recipe=with_window(recipe, shown.cache))  # whose teachers and layers the results name
    source, student = training.source, training.student
    facts = teacher_facts(training.teachers_dir, training.cache, source.teachers, recipe.trusted())
    mixture = None if training.weights is None else training.weights.of_used
    of_teachers = teacher_scores(source, training.data, mixture, missing=recipe.distill.missing)  # fails early
    if source.skipped:
        progress.note(f"{source.skipped} rows are left out: the cache lacks their texts")
    splits = encoded_splits(training, progress)
    for stage in prepared.stages:
        check_evaluation(stage.recipe.distill, "distill", validation="validation" in splits)

    if default_device().type == "cpu":
        keep_freed_blocks()
    training_started = time.perf_counter()
    trained = _train(prepared.stages, splits.get("validation"), run, progress)
    training_seconds = time.perf_counter() - training_started
    source.count_together(processes)

    logits = final_logits(training, splits, trained.stages[-1]["steps"])
    of_student = {name: scores(split.labels, logits[name]) for name, split in splits.items()}
    speed = measure_speed(student.model, student.tokenizer, student.max_length, training.some_texts())
    seconds = time.perf_counter() - started
    measured = Measured(
        of_student,
        of_teachers,
        facts,
        speed,
        trained.best_epoch,
        training_seconds,
        seconds,
        truncated(source, splits),
        trained.stages if recipe.distill.stages else (),
        trained.term_weights,
    )
    results = build_results(training, measured, run.metrics)
    write_predictions(run.predictions, split_predictions(training.data, logits, of_teachers.answers))
    _save(training, results, run, progress)
    return DistillResult(run.student, processes.from_first(lambda: results))


def _help(prepared: Training, run: RunDirectory, processes: Processes) -> DistillResult:
    """``distill`` in processes other than the first: they train with it, and wait for its results."""
    for stage in prepared.stages:
        check_evaluation(stage.recipe.distill, "distill", validation="validation" in prepared.data.splits)
    if default_device().type == "cpu":
        keep_freed_blocks()
    _train(prepared.stages, None, run, SilentProgress())
    next((stage for stage in prepared.stages if stage.source.teachers), prepared).source.count_together(processes)
    return DistillResult(run.student, processes.from_first(dict))


@dataclass(frozen=True)
class _Trained:
    """``best_epoch`` counts from 0, over all stages; ``stages``: settings and outcome of each.

    ``term_weights``: by the name of the stage in metrics.jsonl.
    """

    best_epoch: int
    stages: tuple[Mapping[str, Any], ...]
    term_weights: Mapping[str, Mapping[str, float]]


def _train(
    stages: Sequence[Training], validation: EncodedSplit | None, run: RunDirectory, progress: Progress
) -> _Trained:
    """Train one stage after the other; the student then has the best weights of the last one.

    A stage starts with the weights that the one before ended with: its best ones if it has ``patience``, else its last
    ones. Each stage has checkpoints of its own, so that a finished one is only read again.
    """
    model: DistillationModel | None = None
    found: list[Mapping[str, Any]] = []
    weights: dict[str, Mapping[str, float]] = {}
    begun = epochs_before = 0
    for number, stage in enumerate(stages, start=1):
        section, place, log = stage.recipe.distill, run.checkpoints / STAGE, STAGE
        if len(stages) > 1:
            place, log = (place if number == 1 else place / f"stage-{number}"), f"{STAGE} {number}"
            progress.note(
                f"stage {number} of {len(stages)}: {stage.settings.method.name}, rows: {section.rows or 'all'}"
            )
        weights[log] = {term.name: stage.settings.weight(term) for term in stage.settings.terms}
        model = stage.model(model)
        eager = default_device().type != "cpu" and not section.compile
        model.student.full_mask = eager and takes_full_mask(model.student.network, stage.student.max_length)
        identity = stage.identity(model)
        best = BestEpoch(place / "best", place, identity)
        task = DistillTask(
            model,
            stage.source,
            validation,
            best,
            epochs=section.epochs,
            seed=section.seed,
            accumulation=section.accumulation,
            select_by=section.select_by,
            first_epoch=begun,
        )
        settings = LoopSettings.from_section(section, identity, NEWER_KEYS)
        settings = replace(settings, log_steps=1, lr_by_prefix=_lr_by_prefix(section, model))
        metrics = MetricsLog(run.metrics, log)
        tracking = tracked(metrics, section, name=stage.recipe.name, progress=progress)
        with tracking as lines, compiled_student(stage):
            outcome = train(task, settings, checkpoints=place, progress=progress, on_metrics=lines, counts=task.counts)
        if number == len(stages) or section.patience is not None:
            task.load_best(outcome.best_mark)
        found.append(_stage_result(stage, outcome))
        best_epoch = epochs_before + outcome.best_epoch
        begun, epochs_before = begun + section.epochs, epochs_before + -(-outcome.steps // task.steps_per_epoch)
        if isinstance(stage.source, CachedBatches):
            stage.source.forget_parts()
    return _Trained(best_epoch, tuple(found), weights)


def compiled_student(stage: Training) -> AbstractContextManager[None]:
    """The student's network trains with compiled graphs, if the recipe asks for it."""
    section = stage.recipe.distill
    if not section.compile:
        return nullcontext()
    share = together.current().share(section.batch_size)
    rows = {part.stop - part.start for part in micro_batches(share.stop - share.start, section.accumulation)}
    return compiled(stage.student.model.network, rows=rows, max_length=stage.student.max_length)


def _stage_result(stage: Training, outcome: Outcome) -> dict[str, Any]:
    """Settings and outcome of a stage, for results.json."""
    section = stage.recipe.distill
    return {
        "method": stage.settings.method.name,
        "rows": section.rows or "all",
        "learning_rate": section.learning_rate,
        "weights": section.weights.model_dump(),
        "steps": outcome.steps,
        "best_epoch": outcome.best_epoch + 1,
        "best_score": outcome.best_score if math.isfinite(outcome.best_score) else None,
        "stopped_early": outcome.stopped,
    }


def _lr_by_prefix(section: DistillSection, model: DistillationModel) -> dict[str, float]:
    """Learning rates of the modules that terms own, by the prefix of the parameters' names.

    That of the projections is always there, even without projections: checkpoints are compared on it.
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
    no_onnx = save_student(run.student, training.student, record, model_card(results, recipe))
    if no_onnx:
        progress.note(f"student/ has no model.onnx: {no_onnx}")
    write_file(run.results, (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
    if (run.checkpoints / STAGE).exists():  # the student is saved: nothing is left to continue
        remove_directory(run.checkpoints / STAGE)  # atomically: the next command would refuse half a checkpoint


@dataclass(frozen=True)
class Step:
    """What one optimizer step learns from, and where in the training it is.

    ``pieces``: its micro-batches, on the device of the model.
    """

    pieces: tuple[Batch, ...]
    counts: StepCounts
    moment: Moment


class DistillTask:
    """What the training loop runs: ``distillation`` holds student and projections, ``best`` keeps the best student."""

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
        first_epoch: int = 0,
    ) -> None:
        self.model: nn.Module = distillation
        self._distillation = distillation
        self.steps_per_epoch = source.steps_per_epoch
        self._student = distillation.student
        self._source = source
        self.counts = source if isinstance(source, CachedBatches | LiveBatches) else None  # others count all rows
        self._validation = validation
        self._best = best
        self._total_steps, self._seed = epochs * source.steps_per_epoch, seed
        self._accumulation = accumulation
        self._select_by = select_by
        self._processes = together.current()
        self._first_epoch = first_epoch  # of this stage, so that no two stages have the same order of rows
        self._moment = Moment()  # of the last step

    def batches(self, epoch: int, first_step: int) -> Iterator[Step]:
        """One ``Step`` per optimizer step; on an accelerator the next ones are copied there while a step runs."""
        device = next(self.model.parameters()).device
        if device.type == "cpu":
            for step, pieces in self._on_host(epoch, first_step):
                yield self._complete(step, pieces)
            return
        live = isinstance(self._source, LiveBatches)
        steps = on_device(lambda: self._on_host(epoch, first_step), device, in_thread=not live)
        for step, pieces in steps:
            yield self._complete(step, pieces)

    def _complete(self, step: Step, pieces: tuple[Batch, ...]) -> Step:
        return replace(step, pieces=pieces, counts=self._distillation.counts_of_all(step.counts, self._processes))

    def _on_host(self, epoch: int, first_step: int) -> Iterator[tuple[Step, tuple[Batch, ...]]]:
        """The counts are those of this process's share."""
        before, number, done = epoch * self.steps_per_epoch, self._first_epoch + epoch, first_step
        for batch in self._source.batches(number, first_step):
            moment = Moment(before + done, self._total_steps, number, self._seed)
            yield Step((), self._distillation.counts([batch]), moment), batch.split(self._accumulation)
            done += 1
        if self._processes.world > 1 and done < self.steps_per_epoch:  # without a row of the last step
            yield (
                Step((), self._distillation.counts([]), Moment(before + done, self._total_steps, number, self._seed)),
                (),
            )

    def losses(self, step: Step) -> Iterator[tuple[Tensor, dict[str, float | Tensor]]]:
        """The loss of each micro-batch of this process, divided by the counts of the whole step, and its terms.

        Terms are those before their weights.
        """
        self._moment = step.moment
        for piece in step.pieces:
            loss, terms = self.model(piece, step.counts, step.moment)
            yield loss, dict(terms)

    def evaluate(self, epoch: int) -> dict[str, float]:  # noqa: ARG002 - of the protocol
        """Scores on validation; nothing without one, which makes the last epoch the best.

        While hidden states alone are learned, the classifier is not judged: no ``score``. Raises NonFiniteError for
        logits that are not finite.
        """
        if self._validation is None:
            return {}
        logits = finite_logits(self._student, self._validation, "validation", self._moment.step + 1)
        found = scores(self._validation.labels, logits)
        named = {f"validation/{name}": value for name, value in found.items()}
        if not self._distillation.trains_classifier(self._moment):
            return named
        return {"score": selection_score(found, self._select_by), **named}

    def keep_best(self, mark: int, metrics: dict[str, float]) -> None:  # noqa: ARG002 - of the protocol
        """Keep the student's weights durably; the projections are needed for training only."""
        self._best.keep(mark, {"student": self._student.state_dict()})

    def settle_best(self, mark: int) -> None:
        """Remove the weights kept under other marks."""
        self._best.settle(mark)

    def load_best(self, mark: int) -> None:
        """Put the weights kept under ``mark`` back into the student, in all processes."""
        if self._processes.first:
            self._student.load_state_dict(self._best.load(mark)["student"])
        self._processes.copy_from_first(list(self._student.state_dict().values()))
