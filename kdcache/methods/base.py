"""A distillation method: a declaration of its terms, their weights and their schedule.

    L = sum over terms of a(t) * term,    w_i(x) * s_i(t) = weight of teacher i on row x at step t

    Method      the declaration: one choice for each slot, and its publication
    Term        a part of the loss; states what it needs and binds to a student and its targets
    BoundTerm   a term with its parameters; maps a micro-batch to a scalar
    View        the input of a bound term: a micro-batch with student outputs and targets

The objective (``kdcache.distill.objective``) sums bound terms. It knows no method and no term by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from kdcache.errors import RecipeError
from kdcache.methods.parts.schedule import Schedule, TeacherChoice, TeacherRule, constant, every_teacher
from kdcache.methods.parts.weighting import Weighting, WeightingRule, one

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from kdcache.loading.targets import Batch, Hidden
    from kdcache.methods.parts.layer_map import LayerMapping

Pair = tuple[int, int]  # (teacher index, student layer 1..K), as in Targets.hidden
Scope = Literal["row", "batch"]
Weight = Literal["task", "soft", "hidden"]  # the keys of distill.weights
Direction = Literal["student-to-teacher", "teacher-to-student", "both", "none"]
Feature = Literal["stored", "tokens", "first", "mean"]


@dataclass(frozen=True)
class Needs:
    """What a term reads.

    Attributes:
        logits: The teachers' logits, ``[teachers, batch, classes]``.
        hidden: Which vectors of the hidden states: ``tokens``, the ``first`` token of a text, their ``mean``, or
            the vectors that the cache holds (``stored``). None: no hidden states.
        labels: Gold labels. Rows without one have the label -1, which every term must handle.
    """

    logits: bool = False
    hidden: Feature | None = None
    labels: bool = False

    @property
    def teachers(self) -> bool:
        """Whether anything of a teacher is read."""
        return self.logits or self.hidden is not None


@dataclass(frozen=True)
class Moment:
    """A point in the training. Schedules are pure functions of it, so resume is exact.

    Attributes:
        step: Optimizer steps done before this one.
        total_steps: Optimizer steps of the whole training.
        epoch: From 0.
        seed: ``distill.seed``.
    """

    step: int = 0
    total_steps: int = 1
    epoch: int = 0
    seed: int = 0

    @property
    def share(self) -> float:
        """The completed share of the training, in [0, 1)."""
        return self.step / self.total_steps


@dataclass(frozen=True)
class StepCounts:
    """The divisors of a step's means, counted over all its micro-batches.

    Attributes:
        rows: Rows of the step.
        labelled: Rows with a gold label.
        vectors: Term name -> per layer pair, the number of vectors with a target.
    """

    rows: int
    labelled: int
    vectors: Mapping[str, Mapping[Pair, int]] = field(default_factory=dict)


def no_scores() -> tuple[float, ...]:
    """In place of the teachers' validation scores where there are none."""
    raise RecipeError(
        "the method needs the teachers' validation scores, and there are none",
        "Give data.validation, and dump its texts with kdcache dump-teachers.",
    )


def as_stored(_pair: Pair, stored: Tensor, /) -> Tensor:
    """In place of a projection back to hidden states where nothing is projected."""
    return stored


@dataclass(frozen=True)
class Setup:
    """What a term is bound to: student, targets, and the choices that the method leaves to the recipe.

    Attributes:
        teachers: Their names, in the order of their indices.
        student_width: Dimensions of the student's hidden states.
        dims: Per layer pair, the dimensions of the target.
        variances: Epoch -> per layer pair, the variance of the target, averaged over its dimensions.
        temperature: T of the soft labels.
        t_squared: Whether the soft loss is multiplied by T².
        direction: The side of a layer pair that the learnable W is applied to.
        paper: Plain sums over teachers and layers instead of balanced means.
        seed: Of the initial values of W.
        validation_scores: The score of each teacher on the validation texts, from its logits; higher is better. Raises
            RecipeError or MismatchError where there is none. Computed when called.
        student_scores: ``distill.student_scores``: teacher -> score of a student that was distilled from it alone.
        task_over_rows: Whether the task loss is divided by all rows of a step, not by those with a label.
        unproject: Maps targets ``[n, dim]`` of a layer pair back to hidden states ``[n, width]`` of the teacher, as far
            as the stored projection kept them.
    """

    teachers: tuple[str, ...]
    student_width: int
    dims: Mapping[Pair, int]
    variances: Callable[[int], Mapping[Pair, float]]
    temperature: float = 1.0
    t_squared: bool = False
    direction: Direction = "student-to-teacher"
    paper: bool = False
    seed: int = 0
    validation_scores: Callable[[], tuple[float, ...]] = no_scores
    student_scores: Mapping[str, float] = field(default_factory=dict)
    unproject: Callable[[Pair, Tensor], Tensor] = as_stored
    task_over_rows: bool = False


@dataclass(frozen=True, eq=False)
class View:
    """The input of a term: a micro-batch of B rows padded to L tokens, N teachers, C classes, on one device.

    Attributes:
        student_logits: ``[B, C]``.
        student_hidden: By layer, 0 = embeddings: ``[B, L, width]``. Empty where no term needs hidden states.
        attention_mask: ``[B, L]``; padding may be on either side.
        labels: ``[B]``, -1 = none.
        text_ids: uint8 ``[B, 16]``, in main memory.
        teacher_logits: float32 ``[N, B, C]``; C = 0 where no term needs them.
        hidden_targets: By layer pair; empty where no term needs hidden states.
        weights: w_i(x) * s_i(t), ``[N, B]``. Constants: no gradient flows through them.
        factors: s_i(t) alone, ``[N]``; 0 leaves a teacher out of the step.
        counts: Of the whole step. Sums divided by them add up, over the micro-batches, to the step's mean.
        moment: The point in the training.
    """

    student_logits: Tensor
    student_hidden: Sequence[Tensor]
    attention_mask: Tensor
    labels: Tensor
    text_ids: np.ndarray
    teacher_logits: Tensor
    hidden_targets: Mapping[Pair, Hidden]
    weights: Tensor
    factors: tuple[float, ...]
    counts: StepCounts
    moment: Moment = field(default_factory=Moment)


class Owned(NamedTuple):
    """A module that a term trains at ``rate_factor`` times the student's learning rate; discarded after training."""

    module: nn.Module
    rate_factor: float = 1.0


class BoundTerm(Protocol):
    """A term with its parameters, ready for training.

    Attributes:
        owned: The term's modules by the prefix of their parameters in a checkpoint.
    """

    @property
    def owned(self) -> Mapping[str, Owned]: ...

    def count(self, batch: Batch, /) -> Mapping[Pair, int]:
        """Per layer pair, the vectors of ``batch`` with a target. Called before the batch is moved to the device."""
        ...

    def __call__(self, view: View, log: dict[str, Tensor], /) -> Tensor:
        """The unweighted loss of a micro-batch, a scalar with a gradient. Adds details to ``log``."""
        ...


class Term(Protocol):
    """A part of the loss, as a declaration. Implementations are frozen dataclasses.

    Attributes:
        name: Its name in metrics and schedules.
        weight: The key of ``distill.weights`` that multiplies it.
        needs: What it reads.
        scope: ``row``: a sum over rows, so a step may be cut into micro-batches. ``batch``: it compares rows with each
            other and must see all rows of a step at once.
        weighted: Whether it uses ``View.weights``.
    """

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> Weight: ...
    @property
    def needs(self) -> Needs: ...
    @property
    def scope(self) -> Scope: ...
    @property
    def weighted(self) -> bool: ...

    def bind(self, setup: Setup, /) -> BoundTerm:
        """The term for this student and these targets. Raises RecipeError where they do not fit."""
        ...


@dataclass(frozen=True)
class Method:
    """What the publication of a method fixes. Temperature, weights and direction are left to the recipe.

    Attributes:
        name: As in ``distill.method``; the file is called the same, with _ for -.
        title: Its name in results tables.
        source: Where it was published: paper, section, equation.
        terms: The parts of its loss.
        weighting: The weight of each teacher on each row; a rule is bound to the setup first.
        schedule: How the weight of a term changes over the training.
        teachers: Which teachers count in a step; a rule is bound to the setup first.
        layer_map: Which layers are paired; None leaves it to the recipe.
        note: One line for ``kdcache methods``.
    """

    name: str
    title: str
    source: str
    terms: tuple[Term, ...]
    weighting: Weighting | WeightingRule = one
    schedule: Schedule = constant
    teachers: TeacherChoice | TeacherRule = every_teacher
    layer_map: LayerMapping | None = None
    note: str = ""

    @property
    def uses_teachers(self) -> bool:
        """Whether any term needs a teacher."""
        return any(term.needs.teachers for term in self.terms)

    @property
    def reads(self) -> tuple[str, ...]:
        """The facts about the teachers that its rules read, such as ``validation scores``."""
        rules = [rule for rule in (self.weighting, self.teachers) if isinstance(rule, WeightingRule | TeacherRule)]
        return tuple(dict.fromkeys(rule.reads for rule in rules))

    def bound_weighting(self, setup: Setup) -> Weighting:
        """The weighting for these teachers."""
        return self.weighting.bind(setup) if isinstance(self.weighting, WeightingRule) else self.weighting

    def bound_teachers(self, setup: Setup) -> TeacherChoice:
        """The choice among these teachers."""
        return self.teachers.bind(setup) if isinstance(self.teachers, TeacherRule) else self.teachers

    @property
    def scope(self) -> Scope:
        """``batch`` where any term compares rows with each other."""
        return "batch" if any(term.scope == "batch" for term in self.terms) else "row"
