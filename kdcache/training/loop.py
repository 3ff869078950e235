"""The training loop of co-finetuning and distillation: any device, one process or several, exact resume.

A ``TrainingTask`` gives the model, the batches and the losses. The loop owns the optimizer, the schedule, mixed
precision (through accelerate), clipping, checkpoints and the choice of the best epoch. A task yields the losses of a
step one after the other, and the loop runs the backward pass of each at once. The activations of one loss are therefore
freed before those of the next exist: per teacher in co-finetuning, per micro-batch everywhere. Gradients add up, so the
losses of a task must sum to the loss of the whole batch.

Resume is exact because a checkpoint holds all that the next step depends on: weights, moments, schedule, the states of
the random generators, the position in the epoch and the running sums of the log. On the CPU in float32, the resumed
weights are bit-equal.

With several processes, the losses of a task are those of this process's share of a step, divided by the counts of the
whole step. Gradients and losses are added up over the processes once per step, before clipping. The first process
evaluates and writes; the others get its metrics. Where processes hold different modules (``apart.py``), each computes
the losses of its own, and evaluates and writes them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from kdcache.locks import exclusive
from kdcache.progress import SilentProgress
from kdcache.training import checkpoints as checkpoint_files
from kdcache.training import processes as together
from kdcache.training.apart import Apart
from kdcache.training.device import float32_products, make_accelerator
from kdcache.training.optim import AveragedWeights, WarmupSchedule, adamw
from kdcache.training.row_gradients import RowGradients
from kdcache.training.seeding import own_seed, seed_everything
from kdcache.training.state import Counts, TrainingState
from kdcache.training.step_log import Place, StepLog
from kdcache.training.step_sums import StepSums

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.training.settings import LoopSettings


Metrics = dict[str, float]
_READ_STEPS = 20  # on an accelerator
_CHECKPOINT_MINUTES = 5.0  # where the recipe says nothing


class TrainingTask(Protocol):
    """A model to train. ``model`` holds all trainable parameters; the loop moves it to the device."""

    model: nn.Module
    steps_per_epoch: int

    def batches(self, epoch: int, first_step: int) -> Iterator[Any]:
        """The batches of ``epoch`` (from 0), one per optimizer step, from its step ``first_step`` on."""

    def losses(self, batch: Any) -> Iterator[tuple[Tensor, Mapping[str, float | Tensor]]]:
        """Scalar losses whose sum, over all processes, is the batch's loss, each with its terms for the log.

        The backward pass of each runs before the next is requested. A process without rows in this step has none.
        """

    def evaluate(self, epoch: int) -> Metrics:
        """Metrics of the present weights; called in eval mode, without gradients.

        The weights with the highest ``score`` are the best; without that key, or for NaN, the last ones are.
        """

    def keep_best(self, mark: int, metrics: Metrics) -> None:
        """Write the present weights durably, beside those kept before: these are the best so far.

        ``mark`` is the epoch (from 0) or, with ``evaluate_steps``, the optimizer step (from 0).
        """

    def settle_best(self, mark: int) -> None:
        """Remove all other kept weights: the newest checkpoint names those of ``mark`` as the best."""


@dataclass(frozen=True)
class Outcome:
    """The result of a training.

    ``best_epoch`` counts from 0. ``best_mark`` names the best weights, as in ``TrainingTask.keep_best``.
    """

    best_epoch: int
    steps: int
    best_mark: int
    best_score: float = math.nan
    stopped: bool = False  # before the last epoch, by ``patience``


def train(
    task: TrainingTask,
    settings: LoopSettings,
    *,
    checkpoints: Path,
    progress: Progress,
    on_metrics: Callable[[dict[str, Any]], None],
    shared: Sequence[nn.Parameter] | None = None,
    counts: Counts | None = None,
) -> Outcome:
    """Train to the end, from the newest checkpoint if there is one.

    The model ends with its last weights; with ``ema``, with the last averaged ones.

    Args:
        task: the model, its batches and losses.
        settings: of the loop; also the identity of the training.
        checkpoints: directory; at any interruption its newest checkpoint is valid.
        progress: shows steps and loss.
        on_metrics: gets a dict every ``log_steps`` steps and one per epoch, with ``event``, ``step`` and ``epoch``. The
            first is ``{"event": "start", "step": n}``: later lines of an earlier run are superseded. The event
            ``checkpoint`` says that a checkpoint or the best weights follow.
        shared: of several processes that hold different modules, the parameters that all of them hold, in the same
            order. None where each holds the whole model.
        counts: what this process counts meanwhile; checkpoints keep it.

    Raises:
        NonFiniteError: for NaN or infinity, naming step and term.
        MismatchError: if the checkpoint belongs to another training, or the processes have different inputs.
        LockedError: if another process trains there.
        LostProcessError: if another process of this training ended.
        DamageError, StorageError: for unreadable checkpoints and failing writes.
    """
    first = together.current().first
    if not first:
        progress, on_metrics = SilentProgress(), lambda _line: None
    busy = f"another process is training in '{checkpoints}'"
    locked = exclusive(checkpoints / ".lock", busy=lambda: busy) if first else contextlib.nullcontext()
    with locked, float32_products(settings.tf32):
        run = _Run(task, settings, checkpoints, progress, on_metrics, shared, counts)
        try:
            run.resume()
            progress.start("train", settings.epochs * task.steps_per_epoch, "steps", done=run.place.step)
            while run.place.epoch < settings.epochs and not run.place.stopped:
                run.epoch()
            run.writer.wait()
        finally:
            run.close()
        progress.finish()
        run.finish()
    place = run.place
    return Outcome(place.best_epoch, place.step, run.best_mark, place.best_score, place.stopped)


def micro_batches(rows: int, count: int) -> list[slice]:
    """``rows`` divided into at most ``count`` slices of nearly equal length, none of them empty."""
    count = max(1, min(count, rows))
    edges = [round(index * rows / count) for index in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


class _Run:
    """The state of one training in this process."""

    def __init__(
        self,
        task: TrainingTask,
        settings: LoopSettings,
        checkpoints: Path,
        progress: Progress,
        on_metrics: Callable[[dict[str, Any]], None],
        shared: Sequence[nn.Parameter] | None,
        counts: Counts | None,
    ) -> None:
        self.task, self.settings, self.checkpoints = task, settings, checkpoints
        self.progress, self.on_metrics, self.counts = progress, on_metrics, counts
        self.place, self.processes = Place(), together.current()
        self.identity = settings.full_identity(task.steps_per_epoch)
        self.accelerator = make_accelerator(settings.precision)
        task.model.to(self.accelerator.device)
        plain = adamw(
            task.model.named_parameters(),
            settings.learning_rate,
            settings.weight_decay,
            settings.lr_by_prefix,
            decay_by_prefix=settings.decay_by_prefix,
            fused=settings.fused_adamw,
        )
        self.parameters = [parameter for group in plain.param_groups for parameter in group["params"]]
        steps = settings.epochs * task.steps_per_epoch
        self.schedule = WarmupSchedule(plain, steps, settings.warmup, settings.schedule or "linear")
        self.optimizer = self.accelerator.prepare_optimizer(plain, device_placement=False)
        self.average = None
        if settings.ema is not None:
            self.average = AveragedWeights(task.model.named_parameters(), settings.ema)
        accelerated = self.accelerator.device.type != "cpu"
        every = settings.read_steps or (_READ_STEPS if accelerated else 1)
        threads = accelerated if settings.write_in_thread is None else settings.write_in_thread
        self.writer = checkpoint_files.CheckpointWriter(in_thread=threads and shared is None)
        self.saved_at = time.monotonic()
        self.rows = None if settings.compile else RowGradients(task.model)
        self.log = StepLog(self.place, progress, on_metrics, task.steps_per_epoch, settings.log_steps, every)
        self.apart = None
        if shared is not None:
            self.apart = Apart(self.processes, task.model, shared, settings, self.accelerator.device)
        self.sums = self.apart or StepSums(self.processes, self.parameters, self.accelerator.device, self.rows)
        self.save_is_due = False  # says the clock of the first process
        seed_everything(own_seed(settings.seed, self.processes))

    @property
    def state(self) -> TrainingState:
        """What a checkpoint holds of this process."""
        names = {} if self.apart is None else self.apart.names
        model, scaler = self.task.model, self.accelerator.scaler
        return TrainingState(model, self.optimizer, self.schedule, scaler, self.average, self.place, names, self.counts)

    @property
    def best_mark(self) -> int:
        """The name of the best weights; negative before the first evaluation."""
        return self.place.best_epoch if self.settings.evaluate_steps is None else self.place.best_step - 1

    def epoch(self) -> None:
        """Train the rest of the current epoch, evaluate it, and write a checkpoint at the start of the next."""
        place = self.place
        self.task.model.train()
        for batch in self.task.batches(place.epoch, place.step_in_epoch):
            self.step(batch)
            if place.step_in_epoch < self.task.steps_per_epoch and self._in_the_middle():
                return
        if place.step_in_epoch != self.task.steps_per_epoch:
            raise RuntimeError(f"the task gave {place.step_in_epoch} batches, not {self.task.steps_per_epoch}")
        self.log.read()
        self.evaluate("epoch")
        place.epoch, place.step_in_epoch = place.epoch + 1, 0
        self.save(settle=True)

    def _in_the_middle(self) -> bool:
        """What is due after a step that is not the last of its epoch; whether the training stops here."""
        place, every = self.place, self.settings.evaluate_steps
        if every is not None and place.step % every == 0:
            self.log.read()
            self.evaluate("evaluation")  # before the checkpoint, which then has its outcome
            self.task.model.train()
        self.writer.check()
        if place.stopped or self._checkpoint_is_due():
            self.save(settle=every is not None and place.best_step >= 0)
        return place.stopped

    def _checkpoint_is_due(self) -> bool:
        steps = self.settings.checkpoint_steps
        if steps is not None and self.place.step % steps == 0:
            return True
        return self.save_is_due if self.processes.world > 1 else self._time_has_come()

    def _time_has_come(self) -> bool:
        minutes = self.settings.checkpoint_minutes
        if minutes is None:
            minutes = _CHECKPOINT_MINUTES if self.settings.checkpoint_steps is None else math.inf
        return time.monotonic() - self.saved_at >= 60 * minutes

    def close(self) -> None:
        """Wait for the write of a checkpoint; the model computes gradients as usual again."""
        self.writer.close()
        if self.rows is not None:
            self.rows.close()

    def finish(self) -> None:
        """Put the averaged weights into the model."""
        if self.average is not None:
            self.task.model.load_state_dict(self.average.state_dict(), strict=False)

    def step(self, batch: Any) -> None:
        """Do one optimizer step. Its losses stay on the device until ``read``."""
        place, terms = self.place, dict[str, float | Tensor]()
        losses: list[Tensor] = []
        pending = self.task.losses(batch)
        while True:
            with self.accelerator.autocast():
                item = next(pending, None)
            if item is None:
                break
            loss, parts = item
            self.accelerator.backward(loss)
            losses.append(loss.detach().float())
            for name, value in parts.items():
                terms[name] = terms.get(name, 0.0) + (value.detach() if isinstance(value, Tensor) else value)
            del item, loss, parts
        if self.rows is not None:
            self.rows.gather()
        terms = {"loss": torch.stack(losses).sum() if losses else 0.0, **terms}
        if self.processes.world > 1:
            due = self.processes.first and self._time_has_come()
            terms, self.save_is_due = self.sums.add(terms, due=due)
        norm = self._clip(self.settings.max_grad_norm)
        place.step += 1
        place.step_in_epoch += 1
        values = {"loss": terms.pop("loss"), "grad_norm": norm, **terms}
        # before the update: on a CPU, where every step is read, weights stay finite
        self.log.add(values, self.schedule.learning_rate, scaled=self.accelerator.scaler is not None)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(place.step)
        self.schedule.step()

    def _clip(self, longest: float) -> Tensor:
        if self.apart is not None:
            return self.apart.clip(self.accelerator, longest)
        norm: Tensor = self.accelerator.clip_grad_norm_(self.parameters, longest)
        return norm

    def evaluate(self, event: str) -> None:
        """Evaluate the present weights, or the averaged ones, and keep them if they are the best so far."""
        place = self.place
        self.task.model.eval()
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            metrics = self._metrics()
            score = metrics.get("score", math.nan)
            better = math.isnan(score) or score > place.best_score or place.best_epoch < 0
            if better:
                place.best_epoch, place.best_step = place.epoch, place.step
                place.best_score = -math.inf if math.isnan(score) else score
                self._say("checkpoint")
                self.writer.wait()  # it may still remove what was the best before
                if self.processes.first or self.apart is not None:
                    self.task.keep_best(self.best_mark, metrics)
        place.without_better = 0 if better else place.without_better + 1
        place.stopped = place.without_better == self.settings.patience
        self._say(event, **metrics)
        self._note_evaluation(event, score)

    def _metrics(self) -> Metrics:
        def evaluate() -> Metrics:
            with torch.no_grad(), self.accelerator.autocast():
                return self.task.evaluate(self.place.epoch)

        if self.apart is None:
            return self.processes.from_first(evaluate)
        found = evaluate()
        return self.processes.from_first(lambda: found)

    def _note_evaluation(self, event: str, score: float) -> None:
        place, every = self.place, self.settings.evaluate_steps
        best = f"epoch {place.best_epoch + 1}" + ("" if every is None else f", step {place.best_step}")
        shown = "" if math.isnan(score) else f", score {score:.4f} (best so far: {best})"
        done = "" if event == "epoch" else f", step {place.step}"
        self.progress.note(f"epoch {place.epoch + 1} of {self.settings.epochs}{done or ' done'}{shown}")
        if place.stopped:
            self.progress.note(f"no better score in {place.without_better} evaluations: the training stops")

    def _say(self, event: str, **values: float) -> None:
        self.on_metrics({"event": event, "step": self.place.step, "epoch": self.place.epoch + 1, **values})

    def save(self, *, settle: bool) -> None:
        """Write a checkpoint; metrics up to it are durable before. ``settle``: then remove all but the best weights."""
        self.log.read()
        self.saved_at = time.monotonic()
        owns = self.processes.gathered(self.state.own())
        self._say("checkpoint")
        if self.apart is not None:
            self._save_pieces(owns, settle=settle)
        if self.apart is not None or not self.processes.first:
            return
        state = self.state.whole(owns)
        step, best = self.place.step, self.best_mark
        self.writer.wait()  # before the copy, so that there is one at a time
        saved = checkpoint_files.copied(state) if self.writer.in_thread else state

        def write() -> None:
            checkpoint_files.save(self.checkpoints, saved, step=step, identity=self.identity)
            if settle:
                self.task.settle_best(best)

        self.writer.start(write)
        self.saved_at = time.monotonic()

    def _save_pieces(self, owns: Sequence[tuple[dict[str, Any], Any]], *, settle: bool) -> None:
        files, rest, piece = self.checkpoints, {"rest": self.state.rest(owns)}, self.state.piece()
        step, identity = self.place.step, self.identity
        checkpoint_files.save_pieces(files, rest, piece, step=step, identity=identity, processes=self.processes)
        if settle and self.processes.first:
            self.task.settle_best(self.best_mark)
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        saved = checkpoint_files.open_latest(
            self.checkpoints, identity=self.identity, newer_keys=self.settings.newer_keys
        )
        if saved is not None:
            order = None if self.apart is None else self.apart.order
            note = self.state.load(saved, self.settings.seed, self.processes, order)
            if note:
                self.progress.note(note)
            self.progress.note(f"resumed at step {self.place.step} (epoch {self.place.epoch + 1})")
        alike = self.task.model.state_dict().values() if self.apart is None else self.apart.shared
        together.start(self.processes, self.identity, self.place.step, alike)
        self.on_metrics({"event": "start", "step": self.place.step, "epoch": self.place.epoch + 1})
