"""The total loss of a step: the slots of a method, filled in with a recipe's weights, as one module.

The student and the matrices W_ij live in one module whose ``forward`` ends in the loss, because several processes
(accelerate) only see parameters that ``forward`` touches, and because one checkpoint must hold them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from kdcache.distill.losses import (
    Direction,
    HiddenProjections,
    Pair,
    balanced_mean,
    mean_squared_error,
    plain_sum,
    share_of_variance,
    soft_losses,
    task_loss,
    teacher_weights,
)
from kdcache.distill.methods import Method, find_method

if TYPE_CHECKING:
    from kdcache.distill.student import StudentModel
    from kdcache.distill.targets import Batch, Targets
    from kdcache.recipe import DistillSection

PROJECTIONS = "projections."  # how the names of the W_ij start in DistillationModel


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a total loss depends on besides the data; plain values."""

    method: Method
    temperature: float = 1.0
    t_squared: bool = False
    task: float = 1.0  # weights of the terms
    soft: float = 1.0
    hidden: float = 0.1
    direction: Direction = "student-to-teacher"
    balanced: bool = True  # hidden: mean of shares of variance; False = the paper's plain sum

    @property
    def needs_hidden(self) -> bool:
        """Whether hidden targets are read at all."""
        return self.method.hidden and self.hidden > 0

    @property
    def needs_logits(self) -> bool:
        """Whether the teachers' logits are read at all."""
        soft = self.method.soft_loss is not None and self.soft > 0
        return soft or (self.needs_hidden and self.method.weighting_on_hidden)


def objective_settings(section: DistillSection) -> ObjectiveSettings:
    """From a recipe. ``paper = true`` means: plain sums, the teacher's side projected, all weights 1, no factor T²."""
    method = find_method(section.method)
    if section.paper:
        return ObjectiveSettings(
            method, section.temperature, task=1.0, soft=1.0, hidden=1.0, direction="teacher-to-student", balanced=False
        )
    weights = section.weights
    return ObjectiveSettings(
        method, section.temperature, section.t_squared, weights.task, weights.soft, weights.hidden, section.hidden_direction
    )


@dataclass(frozen=True)
class StepCounts:
    """What the means of a step divide by, over all its micro-batches and processes."""

    rows: int
    labelled: int
    covered: dict[Pair, int]  # student tokens with a target


def step_counts(batches: Sequence[Batch]) -> StepCounts:
    """Counts over the micro-batches of one optimizer step."""
    covered: dict[Pair, int] = {}
    for batch in batches:
        for pair, hidden in batch.targets.hidden.items() if batch.targets else ():
            covered[pair] = covered.get(pair, 0) + hidden.count
    labelled = sum(int((batch.labels >= 0).sum()) for batch in batches)
    return StepCounts(sum(len(batch.labels) for batch in batches), labelled, covered)


class DistillationModel(nn.Module):
    """Student, projections and objective; ``forward`` gives the loss of a micro-batch and its terms.

    ``teachers`` and ``variances`` follow the order of the target source: (teacher index, student layer) -> variance.
    """

    def __init__(
        self,
        student: StudentModel,
        settings: ObjectiveSettings,
        teachers: Sequence[str],
        *,
        dims: dict[Pair, int],
        variances: dict[Pair, float],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self.settings = settings
        self.teachers = tuple(teachers)
        self.variances = variances
        self.projections = HiddenProjections(dims, student.width, settings.direction, seed=seed) if dims else None

    def forward(self, batch: Batch, counts: StepCounts) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, terms before their weights). Summed over the micro-batches of a step both are those of the whole step."""
        settings = self.settings
        output = self.student(batch.inputs, hidden_states=settings.needs_hidden)
        terms = {"task": task_loss(output.logits, batch.labels, counts.labelled)}
        loss = settings.task * terms["task"]
        if batch.targets is None or not settings.method.uses_teachers:
            return loss, terms
        weights = self._teacher_weights(output.logits, batch, counts, terms)
        if settings.method.soft_loss is not None and settings.soft > 0:
            terms["soft"] = self._soft(output.logits, batch.targets, weights, counts, terms)
            loss = loss + settings.soft * terms["soft"]
        if settings.needs_hidden:
            terms["hidden"] = self._hidden(output.hidden_states, batch, weights, counts, terms)
            loss = loss + settings.hidden * terms["hidden"]
        return loss, terms

    def _teacher_weights(self, logits: Tensor, batch: Batch, counts: StepCounts, terms: dict[str, Tensor]) -> Tensor:
        """w_i(x) as [teachers, batch]; their means are logged, since weights near 1 everywhere say little."""
        if not self.settings.needs_logits or batch.targets is None:
            return logits.new_ones(len(self.teachers), len(batch.labels))
        weights = teacher_weights(self.settings.method.weighting, logits, batch.targets.logits, batch.labels)
        for name, row in zip(self.teachers, weights, strict=True):
            terms[f"weight/{name}"] = row.sum() / counts.rows
        return weights

    def _soft(self, logits: Tensor, targets: Targets, weights: Tensor, counts: StepCounts, terms: dict[str, Tensor]) -> Tensor:
        settings, method = self.settings, self.settings.method
        assert method.soft_loss is not None
        losses = soft_losses(
            logits,
            targets.logits,
            weights,
            temperature=settings.temperature,
            t_squared=settings.t_squared,
            mixing=method.mixing,
            soft_loss=method.soft_loss,
            count=counts.rows,
        )
        if len(losses) == len(self.teachers):
            terms |= {f"soft/{name}": loss for name, loss in zip(self.teachers, losses, strict=True)}
        return losses.sum()

    def _hidden(
        self, hidden_states: Sequence[Tensor], batch: Batch, weights: Tensor, counts: StepCounts, terms: dict[str, Tensor]
    ) -> Tensor:
        assert self.projections is not None
        assert batch.targets is not None
        length, targets = batch.inputs["input_ids"].shape[1], batch.targets.hidden
        losses: dict[Pair, Tensor] = {}
        for pair, (student, teacher) in self.projections(hidden_states, targets).items():
            rows = targets[pair].rows(length) if self.settings.method.weighting_on_hidden else None
            token_weights = None if rows is None else weights[pair[0]][rows]
            losses[pair] = mean_squared_error(student, teacher, token_weights=token_weights, count=counts.covered[pair])
        if self.settings.balanced:
            losses = share_of_variance(losses, self.variances)
        terms |= {f"hidden/{self.teachers[i]}/{j}": loss for (i, j), loss in sorted(losses.items())}
        return balanced_mean(losses) if self.settings.balanced else plain_sum(losses)
