"""What a distillation method is: a declaration of its terms, their weights, and when each of them counts.

    L = sum over terms of a(t) * term,    w_i(x) * s_i(t) = weight of teacher i on row x at step t

    Method      the declaration: one choice for each slot, and where it was published
    Term        a part of the loss; says what it needs and binds itself to a student and its targets
    BoundTerm   the same, ready: owns its parameters, maps a micro-batch to a number
    View        what a bound term sees of a micro-batch

The objective (``kdcache.distill.objective``) sums bound terms. It knows no method and no term by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from kdcache.methods.parts.schedule import Schedule, TeacherChoice, constant, every_teacher
from kdcache.methods.parts.weighting import Weighting, one

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from kdcache.loader.targets import Batch, Hidden
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
            whatever the cache holds (``stored``). None: no hidden states.
        labels: Gold labels. Rows without one have the label -1; every term has a form for them.
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
    """A place in the training. What changes over time is a pure function of it, so resume is exact.

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
        """The part of the training that is done, from 0 to below 1."""
        return self.step / self.total_steps


@dataclass(frozen=True)
class StepCounts:
    """What the means of a step divide by, over all its micro-batches.

    Attributes:
        rows: Rows of the step.
        labelled: Rows with a gold label.
        vectors: By name of the term: how many vectors of each layer pair have a target.
    """

    rows: int
    labelled: int
    vectors: Mapping[str, Mapping[Pair, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What a term binds to: student, targets, and the choices that the method leaves to the recipe.

    Attributes:
        teachers: Their names, in the order of their indices.
        student_width: Dimensions of the student's hidden states.
        dims: Of each layer pair, the dimensions of the target.
        variances: Epoch -> of each layer pair, the mean variance of the target over its dimensions.
        temperature: T of the soft labels.
        t_squared: Whether the soft loss is multiplied by T².
        direction: On which side of a layer pair the learnable W stands.
        paper: Plain sums over teachers and layers instead of balanced means.
        seed: Of the initial values of W.
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


@dataclass(frozen=True, eq=False)
class View:
    """What a term sees of a micro-batch: B rows padded to L tokens, N teachers, C classes. Tensors lie on one device.

    Attributes:
        student_logits: ``[B, C]``.
        student_hidden: By layer, 0 = embeddings: ``[B, L, width]``. Empty where no term needs hidden states.
        attention_mask: ``[B, L]``; padding may be on either side.
        labels: ``[B]``, -1 = none.
        text_ids: uint8 ``[B, 16]``, in main memory.
        teacher_logits: float32 ``[N, B, C]``; C = 0 where no term needs them.
        hidden_targets: By layer pair; empty where no term needs hidden states.
        weights: w_i(x) * s_i(t), ``[N, B]``. Constants: no gradient flows through them.
        factors: s_i(t) alone, ``[N]``: 0 for a teacher that sits this step out.
        counts: Of the whole step. Sums divided by them add up to the step's mean over its micro-batches.
        moment: The place in the training.
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
    """A module that a term trains at ``rate_factor`` times the student's learning rate. Thrown away after training."""

    module: nn.Module
    rate_factor: float = 1.0


class BoundTerm(Protocol):
    """A term that is ready for training.

    Attributes:
        owned: The term's modules by the name that their parameters have in a checkpoint.
    """

    @property
    def owned(self) -> Mapping[str, Owned]: ...

    def count(self, batch: Batch, /) -> Mapping[Pair, int]:
        """How many vectors of each layer pair have a target in ``batch``. Called before the batch is on the device."""
        ...

    def __call__(self, view: View, log: dict[str, Tensor], /) -> Tensor:
        """The loss of a micro-batch before its weight, a scalar with a gradient. Details to log go into ``log``."""
        ...


class Term(Protocol):
    """A part of the loss, declared. Implementations are frozen dataclasses.

    Attributes:
        name: In the metrics, and in schedules.
        weight: The key of ``distill.weights`` that multiplies it.
        needs: What it reads.
        scope: ``row``: a sum over rows, so a step may be cut into micro-batches. ``batch``: it compares rows with each
            other and must see all rows of a step at once.
        weighted: Whether it uses the teachers' weights on the rows.
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
        """The term for this student and these targets. RecipeError where they do not fit."""
        ...


@dataclass(frozen=True)
class Method:
    """A distillation method: what its publication fixes. Temperature, weights and direction are left to the recipe.

    Attributes:
        name: As in ``distill.method``; the file is called the same, with _ for -.
        title: What a results table calls it.
        source: Where it was published: paper, section, equation.
        terms: The parts of its loss.
        weighting: How much a teacher counts on a row.
        schedule: How the weight of a term changes over the training.
        teachers: Which teachers count in a step.
        layer_map: Which layers are paired; None leaves it to the recipe.
        note: A line for ``kdcache methods``.
    """

    name: str
    title: str
    source: str
    terms: tuple[Term, ...]
    weighting: Weighting = one
    schedule: Schedule = constant
    teachers: TeacherChoice = every_teacher
    layer_map: LayerMapping | None = None
    note: str = ""

    @property
    def uses_teachers(self) -> bool:
        """Whether any term needs a teacher."""
        return any(term.needs.teachers for term in self.terms)

    @property
    def scope(self) -> Scope:
        """``batch`` where any term compares rows with each other."""
        return "batch" if any(term.scope == "batch" for term in self.terms) else "row"
