"""The total loss of a step: the weighted sum of a method's terms.

The student and the modules of the terms (the matrices W) are in one module whose ``forward`` returns the loss, so one
checkpoint holds all of them. Terms are used through ``kdcache.methods.base`` only; no method or term is known here by
name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdcache.errors import RecipeError
from kdcache.methods.base import (
    Direction,
    Method,
    Moment,
    Owned,
    Pair,
    Setup,
    StepCounts,
    Term,
    View,
    Weight,
    as_stored,
    no_scores,
)
from kdcache.methods.parts.layer_map import EVEN, LAYER_MAPPINGS, LayerMapping
from kdcache.methods.parts.weighting import constants, teacher_weights
from kdcache.methods.registry import find_method
from kdcache.training.processes import current

if TYPE_CHECKING:
    from kdcache.distill.teacher_weights import WeightedTeachers
    from kdcache.loading.targets import Batch, Targets
    from kdcache.recipe import DistillSection
    from kdcache.students.model import StudentModel
    from kdcache.training.processes import Processes


@dataclass(frozen=True)
class ObjectiveSettings:
    """The settings of the total loss, as plain values."""

    method: Method
    temperature: float = 1.0
    t_squared: bool = False
    task: float = 1.0  # weights of the terms
    soft: float = 1.0
    hidden: float = 0.1
    direction: Direction = "student-to-teacher"
    paper: bool = False  # plain sums over teachers and layers instead of balanced means
    layer_map: LayerMapping = EVEN
    student_scores: Mapping[str, float] = field(default_factory=dict)  # teacher -> score of a student of it alone
    task_over_rows: bool = False  # the task loss is divided by all rows of a step, not by those with a label

    def weight(self, term: Term) -> float:
        """The weight of a term, from the recipe."""
        weights: dict[Weight, float] = {"task": self.task, "soft": self.soft, "hidden": self.hidden}
        return weights[term.weight]

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms that are computed; teacher outputs for a term of weight 0 are not even read."""
        return tuple(term for term in self.method.terms if self.weight(term) > 0 or not term.needs.teachers)

    @property
    def needs_hidden(self) -> bool:
        """Whether hidden targets are read at all."""
        return any(term.needs.hidden for term in self.terms)

    @property
    def needs_logits(self) -> bool:
        """Whether the teachers' logits are read at all."""
        return any(term.needs.logits for term in self.terms)


def objective_settings(section: DistillSection) -> ObjectiveSettings:
    """From a recipe. ``paper = true`` means: plain sums, the teacher's side projected, all weights 1, no factor T².

    Raises RecipeError for an unknown method, a layer map that the method does not take, and micro-batches or several
    processes for a method that compares the rows of a batch.
    """
    method = find_method(section.method)
    layer_map = _layer_map(section, method)
    if section.paper:
        settings = ObjectiveSettings(
            method, section.temperature, hidden=1.0, direction="teacher-to-student", paper=True, layer_map=layer_map
        )
    else:
        task, soft, hidden = section.weights.task, section.weights.soft, section.weights.hidden
        scale, direction = (section.temperature, section.t_squared), section.hidden_direction
        settings = ObjectiveSettings(method, *scale, task, soft, hidden, direction, layer_map=layer_map)
    settings = replace(
        settings, student_scores=section.student_scores or {}, task_over_rows=section.task_mean == "rows"
    )
    if not any(settings.weight(term) for term in settings.terms):
        keys = " and ".join(f"{key} = 0" for key in dict.fromkeys(term.weight for term in method.terms))
        raise RecipeError(
            f"nothing would be learned: method '{method.name}' has the loss 0 with {keys} in distill.weights",
            "Give one of them a weight above 0.",
        )
    across = [term.name for term in settings.terms if term.scope == "batch"]
    if across and section.accumulation > 1:
        raise RecipeError(
            f"the term '{across[0]}' of method '{method.name}' compares the rows of a batch with each other, "
            f"and distill.accumulation = {section.accumulation} cuts batches into micro-batches",
            "Set distill.accumulation = 1, with a smaller distill.batch_size where memory is short.",
        )
    if across and current().world > 1:
        raise RecipeError(
            f"the term '{across[0]}' of method '{method.name}' compares the rows of a batch with each other, "
            f"and the training was started in {current().world} processes, which divide the batches",
            "Start it in one process, without torchrun.",
        )
    return settings


def _layer_map(section: DistillSection, method: Method) -> LayerMapping:
    wanted = section.layer_map
    if method.layer_map is None:
        return EVEN if wanted is None else LAYER_MAPPINGS[wanted]
    if wanted is not None and wanted != method.layer_map.name:
        raise RecipeError(
            f"distill.layer_map is '{wanted}', but method '{method.name}' has its own: {method.layer_map.name}",
            "Leave distill.layer_map out, or choose layers with distill.teacher_layers.",
        )
    return method.layer_map


class DistillationModel(nn.Module):
    """Student and terms; ``forward`` gives the loss of a micro-batch and its terms.

    ``dims`` and ``variances`` map (teacher index, student layer) to a value, where indices follow ``teachers``.
    ``variances`` are given per epoch, since a layer map may change between epochs. ``scores`` and
    ``unproject`` are fields of ``Setup``. ``weighted``: weights and temperatures of the teachers, equal and 1 where
    None.
    """

    def __init__(
        self,
        student: StudentModel,
        settings: ObjectiveSettings,
        teachers: Sequence[str],
        *,
        dims: Mapping[Pair, int],
        variances: Callable[[int], Mapping[Pair, float]],
        seed: int = 0,
        scores: Callable[[], tuple[float, ...]] = no_scores,
        unproject: Callable[[Pair, Tensor], Tensor] = as_stored,
        weighted: WeightedTeachers | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.settings = settings
        self.teachers = tuple(teachers)
        self.weighted = weighted
        setup = Setup(
            self.teachers,
            student.width,
            dims,
            variances,
            temperature=settings.temperature,
            t_squared=settings.t_squared,
            direction=settings.direction,
            paper=settings.paper,
            seed=seed,
            student_scores=settings.student_scores,
            validation_scores=scores,
            unproject=unproject,
            task_over_rows=settings.task_over_rows,
        )
        self._weighting, self._choice = settings.method.bound_weighting(setup), settings.method.bound_teachers(setup)
        self._terms = [(term, term.bind(setup)) for term in settings.terms]
        self.owned: dict[str, Owned] = {}
        for _, bound in self._terms:
            self.owned |= bound.owned
        for name, owned in self.owned.items():
            self.add_module(name, owned.module)

    def trains_classifier(self, moment: Moment) -> bool:
        """Whether a term that reads the student's logits counts at this point, and not hidden states alone."""
        terms = [term for term in self.settings.terms if term.needs.hidden is None]
        return any(self.settings.weight(term) * self.settings.method.schedule(term.name, moment) for term in terms)

    def take_over(self, before: DistillationModel) -> None:
        """Take the parameters that terms own, such as projections, from a model of the same method."""
        theirs, ours = before.state_dict(), self.state_dict()
        same = {
            name: theirs[name]
            for name, tensor in ours.items()
            if not name.startswith("student.") and name in theirs and theirs[name].shape == tensor.shape
        }
        self.load_state_dict(same, strict=False)

    def counts(self, batches: Sequence[Batch]) -> StepCounts:
        """Counts over the micro-batches of an optimizer step. Call it before they are moved to the device."""
        vectors: dict[str, dict[Pair, int]] = {}
        for term, bound in self._terms:
            totals = vectors.setdefault(term.name, {})
            for batch in batches:
                for pair, count in bound.count(batch).items():
                    totals[pair] = totals.get(pair, 0) + count
        labelled = sum(int((batch.labels >= 0).sum()) for batch in batches)
        return StepCounts(sum(len(batch.labels) for batch in batches), labelled, vectors)

    def counts_of_all(self, own: StepCounts, processes: Processes) -> StepCounts:
        """The counts of a step over all processes, from those of each one's share."""
        if processes.world == 1:
            return own
        pairs = list(itertools.product(range(len(self.teachers)), range(self.student.depth + 1)))
        places = [(name, pair) for name in own.vectors for pair in pairs]
        mine = [own.vectors[name].get(pair, 0) for name, pair in places]
        rows, labelled, *found = processes.sums([own.rows, own.labelled, *mine])
        vectors: dict[str, dict[Pair, int]] = {name: {} for name in own.vectors}
        for (name, pair), count in zip(places, found, strict=True):
            vectors[name][pair] = count
        return StepCounts(rows, labelled, vectors)

    def forward(
        self, batch: Batch, counts: StepCounts, moment: Moment | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, unweighted terms). Both add up over the micro-batches of a step."""
        moment, method = moment or Moment(), self.settings.method
        output = self.student(batch.inputs, hidden_states=self.settings.needs_hidden)
        log: dict[str, Tensor] = {}
        view = self._view(output.logits, output.hidden_states, batch, counts, moment, log)
        loss: Tensor | None = None
        for term, bound in self._terms:
            weight = self.settings.weight(term) * method.schedule(term.name, moment)
            if term.needs.teachers and (weight == 0 or batch.targets is None):
                continue
            log[term.name] = bound(view, log)
            weighted = weight * log[term.name]
            loss = weighted if loss is None else loss + weighted
        return output.logits.sum() * 0 if loss is None else loss, log

    def _view(
        self,
        logits: Tensor,
        hidden: Sequence[Tensor],
        batch: Batch,
        counts: StepCounts,
        moment: Moment,
        log: dict[str, Tensor],
    ) -> View:
        """The input of the terms. The mean weight of each teacher is logged."""
        targets, teachers = batch.targets, len(self.teachers)
        targets, factors, rows = self._by_weight(targets, self._choice(moment, teachers))
        weights = logits.new_ones(teachers, len(batch.labels))
        if targets is not None and any(term.weighted for term, _ in self._terms):
            weights = teacher_weights(self._weighting, logits, targets.logits, batch.labels)
            if rows is not None:
                weights = weights * rows
            elif any(factor != 1.0 for factor in factors):
                weights = weights * constants(factors, weights)[:, None]
            log |= {f"weight/{name}": row.sum() / counts.rows for name, row in zip(self.teachers, weights, strict=True)}
        return View(
            student_logits=logits,
            student_hidden=hidden,
            attention_mask=batch.inputs["attention_mask"],
            labels=batch.labels,
            text_ids=batch.text_ids,
            teacher_logits=logits.new_empty(teachers, len(batch.labels), 0) if targets is None else targets.logits,
            hidden_targets={} if targets is None else targets.hidden,
            weights=weights,
            factors=factors,
            counts=counts,
            moment=moment,
        )

    def _by_weight(
        self, targets: Targets | None, chosen: tuple[float, ...]
    ) -> tuple[Targets | None, tuple[float, ...], Tensor | None]:
        """Targets at the teachers' temperatures, ``chosen`` times their weights, and the same for each row."""
        own = self.weighted
        if own is None or not chosen:
            return targets, chosen, None
        factors = tuple(factor * weight for factor, weight in zip(chosen, own.factors, strict=True))
        if targets is None or not targets.logits.shape[-1]:
            return targets, factors, None
        scaled = own.scaled(targets.logits)
        by_choice = constants(chosen, scaled)[:, None]
        rows = by_choice * own.row_factors(scaled)
        rows = torch.where(rows.sum(dim=0) > 0, rows, by_choice)  # class weights may leave out all that were chosen
        return replace(targets, logits=scaled), factors, rows
