"""The trainings of a recipe: ``[cofinetune]``, ``[student]`` and ``[distill]`` with its stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from kdcache.recipe.values import (
    AboveZero,
    BlockNumbers,
    Count,
    Fraction,
    NonEmpty,
    NotNegative,
    Positive,
    Precision,
    Section,
    Seed,
    Strings,
    Trackers,
)

FINE_TUNE = "fine-tune"  # the method without teachers


def _equal_is_none(value: Any) -> Any:
    """``equal`` is the absence of the key, so that records of recipes are those of 0.1.0."""
    if isinstance(value, str) and value not in ("equal", "fitted"):
        expected = "'equal', 'fitted' or a table {NAME = 0.7, ...}"
        raise PydanticCustomError("literal_error", "{expected} was expected", {"expected": expected})
    return None if value == "equal" else value


TeacherWeights = Literal["fitted"] | Annotated[dict[str, NotNegative], Field(min_length=1)]


def _unless(usual: str) -> AfterValidator:
    """Turns the default, written out, into None: so it is what runs of earlier versions had."""
    return AfterValidator(lambda value: None if value == usual else value)


AnySchedule = Literal["linear", "cosine", "constant"]
Schedule = Annotated[AnySchedule | None, _unless("linear")]
Rows = Annotated[Literal["all", "train", "labelled"] | None, _unless("all")]
Placement = Annotated[Literal["rows", "teacher"] | None, _unless("rows")]


ARITHMETIC = frozenset(("tf32", "compile", "fused_adamw"))  # keys that are no part of an identity where not given


class OptimSection(Section):
    """Keys of both trainings.

    After a linear warm-up the learning rate falls to zero, linearly or as a cosine, or stays constant.
    """

    epochs: Positive = 3  # passes over the rows
    batch_size: Positive = 32  # rows of an optimizer step
    learning_rate: AboveZero = 2e-5  # the highest, after the warm-up
    warmup: Fraction = 0.1  # share of all optimizer steps
    schedule: Schedule = None  # after the warm-up: linear (default) or cosine to zero, or constant
    weight_decay: NotNegative = 0.01  # of AdamW; not of biases and norms
    max_grad_norm: AboveZero = 1.0  # longer gradients are scaled to this norm
    accumulation: Positive = 1  # micro-batches per optimizer step; batch_size is that of the step
    precision: Precision = "float32"  # of the forward pass; weights stay float32
    checkpoint_steps: Positive | None = None  # write a checkpoint every so many steps
    checkpoint_minutes: AboveZero | None = None  # and every so many minutes; 5 where neither key is given
    tf32: bool | None = None  # on a GPU: float32 products with 10 bits of mantissa; torch's own default where not given
    compile: bool | None = None  # torch.compile, with texts padded to one of eight lengths
    fused_adamw: bool | None = None  # the optimizer's fused kernel; used where there is one if not given
    select_by: Literal["accuracy", "macro_f1", "matthews", "loss"] = "accuracy"  # on validation: gives the best epoch
    evaluate_steps: Positive | None = None  # evaluate on validation every so many steps too, not only after each epoch
    patience: Positive | None = None  # stop after so many evaluations in a row without a better score
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # decay of averaged weights, which are then evaluated
    seed: Seed = 0  # of weights, order of rows and dropout
    trackers: Trackers | None = None  # also get the lines of metrics.jsonl

    @model_validator(mode="after")
    def _micro_batches_have_rows(self) -> OptimSection:
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation {self.accumulation} cuts a batch of {self.batch_size} into more pieces than it has rows"
            )
        return self


class CofinetuneSection(OptimSection):
    """Joint training of the teachers (MT-BERT, section 3.1)."""

    pooling: Literal["attention", "cls", "mean", "last"] = "attention"  # of the shared head
    width: Positive | None = None  # of the shared space; the widest teacher where not given
    gradient_checkpointing: bool = False  # less memory, more time
    folds: Annotated[int, Field(ge=2, le=100)] | None = None  # train so many further bundles, each without a fold
    placement: Placement = None  # what each of several processes has: rows of every step (default), or whole teachers


class StudentSection(Section):
    """The student: ``init_from`` is a hub name, a directory or ``teacher:NAME``; or ``config`` for random weights."""

    init_from: NonEmpty | None = None  # a hub name, a directory, or teacher:NAME
    config: dict[str, Any] | None = None  # of a transformers model with random weights
    tokenizer: NonEmpty | None = None  # where init_from has none, or for config
    layers: Positive | BlockNumbers | None = None  # the first K, or the (1-based) layers to keep; all where not given
    head: Literal["standard", "shared"] = "standard"  # standard: that of transformers; shared: that of the teachers
    max_length: Positive | None = None  # data.max_length where not given
    trust_remote_code: bool = False  # run the Python code that comes with the model or its tokenizer

    @model_validator(mode="after")
    def _one_origin(self) -> StudentSection:
        if (self.init_from is None) == (self.config is None):
            raise ValueError("give either init_from or config")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("config needs tokenizer: a hub name or a directory")
        return self


class WeightsSection(Section):
    """Factors of the loss terms."""

    task: NotNegative = 1.0  # cross-entropy with the label
    soft: NotNegative = 1.0  # soft labels of the teachers
    hidden: NotNegative = 0.1  # hidden states of the teachers


class StageWeights(Section):
    """Factors of the loss terms in a stage; those of ``distill.weights`` where not given."""

    task: NotNegative | None = None
    soft: NotNegative | None = None
    hidden: NotNegative | None = None


class StageSection(Section):
    """A stage of the training of the student; keys that are not given are as in ``[distill]``."""

    epochs: Positive | None = None
    batch_size: Positive | None = None
    learning_rate: AboveZero | None = None
    projection_learning_rate: AboveZero | None = None
    warmup: Fraction | None = None
    schedule: AnySchedule | None = None
    evaluate_steps: Positive | None = None
    patience: Positive | None = None
    rows: Literal["all", "train", "labelled"] | None = None
    method: str | None = None
    temperature: AboveZero | None = None
    t_squared: bool | None = None
    weights: StageWeights = StageWeights()


class BaselineSection(Section):
    """Training of the same student without teachers; keys that are not given are as in ``[distill]``.

    With any key it is one training, also where ``[distill]`` has stages.
    """

    epochs: Positive | None = None
    batch_size: Positive | None = None
    accumulation: Positive | None = None
    learning_rate: AboveZero | None = None
    warmup: Fraction | None = None
    schedule: AnySchedule | None = None
    evaluate_steps: Positive | None = None
    patience: Positive | None = None


class DistillSection(OptimSection):
    """Training of the student from cached (or live) targets."""

    learning_rate: AboveZero = 5e-5  # the highest, after the warm-up
    projection_learning_rate: AboveZero | None = None  # of the W_ij; else ten times learning_rate, once with paper
    method: str = "mt-bert"  # a name of kdcache methods
    paper: bool = False  # plain sums, teacher-to-student, all weights 1
    temperature: AboveZero = 1.0  # divides logits of teachers and student before the softmax
    t_squared: bool = False  # multiplies the soft loss by the squared temperature
    hidden_direction: Literal["student-to-teacher", "teacher-to-student", "both", "none"] = (
        "student-to-teacher"  # of the W_ij
    )
    layer_map: Literal["even", "last", "random"] | None = None  # that of the method where not given, else even
    teachers: Annotated[Strings, Field(min_length=1)] | None = None  # of the cache; all where not given
    teacher_layers: dict[str, list[Count]] | None = None  # per teacher, one for each student layer; else even
    student_scores: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None = (
        None  # teacher -> validation score of a student distilled from it alone; for methods that weigh teachers by it
    )
    teacher_weights: Annotated[TeacherWeights | None, BeforeValidator(_equal_is_none)] = (
        None  # per teacher; "fitted": to the cached validation logits; "equal" where not given
    )
    teacher_temperatures: Annotated[dict[str, AboveZero], Field(min_length=1)] | None = (
        None  # per teacher: divides its logits; those fitted with "fitted", else 1
    )
    teacher_class_weights: Annotated[dict[str, list[NotNegative]], Field(min_length=1)] | None = (
        None  # per teacher one for each class that the mixture by teacher_weights predicts
    )
    missing: Literal["error", "skip"] = "error"  # train rows whose text the cache lacks
    # parts from which a batch is drawn; all: a uniform shuffle; where not given 8, or fewer of the larger parts that a
    # dump of over 4.2 million texts has
    window: Positive | Literal["all"] | None = None
    rows: Rows = None  # what to learn from: all (default), train without transfer texts, or labelled rows only
    dropout: Fraction | None = None  # of the student; that of its config where not given
    weights: WeightsSection = WeightsSection()  # factors of the loss terms
    task_mean: Literal["labelled", "rows"] | None = (
        None  # rows that the task loss of a step is divided by; else labelled
    )
    stages: Annotated[list[StageSection], Field(min_length=1)] | None = None  # trained one after the other

    @model_validator(mode="after")
    def _stages_are_possible(self) -> DistillSection:
        for number, stage in enumerate(self.in_stages() if self.stages else (), start=1):
            if stage.accumulation > stage.batch_size:
                raise ValueError(f"stage {number}: accumulation {stage.accumulation} is over {stage.batch_size} rows")
        return self

    def in_stages(self) -> tuple[DistillSection, ...]:
        """The settings of each stage; these settings alone where no stages are given."""
        return (self,) if self.stages is None else tuple(self._in_stage(stage) for stage in self.stages)

    def _in_stage(self, stage: StageSection) -> DistillSection:
        given = stage.model_dump(exclude_none=True, exclude={"weights"})
        usual = {"schedule": "linear", "rows": "all"}  # None here, as for keys outside stages
        changed = {key: None if usual.get(key) == value else value for key, value in given.items()}
        weights = self.weights.model_copy(update=stage.weights.model_dump(exclude_none=True))
        return self.model_copy(update={**changed, "weights": weights})

    def plain(self) -> DistillSection:
        """For the method ``fine-tune`` the gold labels alone: a task loss of weight 1, in the same stages.

        Stages give no method, temperature or weight then. With other methods these settings as they are.
        """
        if self.method != FINE_TUNE:
            return self
        of_teachers = {"method": None, "temperature": None, "t_squared": None, "weights": StageWeights()}
        stages = self.stages and [stage.model_copy(update=of_teachers) for stage in self.stages]
        weights = self.weights.model_copy(update={"task": 1.0})
        return self.model_copy(update={"stages": stages, "weights": weights})

    def without_teachers(self, own: BaselineSection | None = None) -> DistillSection:
        """The settings of the baseline: the same training on gold labels alone, in as many stages, or its ``own``.

        Raises ValueError where its own batch has fewer rows than micro-batches.
        """
        given = own.model_dump(exclude_none=True) if own else {}
        plain = self.model_copy(update={"method": FINE_TUNE}).plain()
        stages = None if given else plain.stages
        if given.get("schedule") == "linear":
            given["schedule"] = None  # as for the key outside of this section
        alone = plain.model_copy(update={"paper": False, "task_mean": None, "stages": stages, **given})
        if alone.accumulation > alone.batch_size:
            raise ValueError(
                f"[baseline] has batches of {alone.batch_size} rows in {alone.accumulation} micro-batches "
                "(batch_size and accumulation, those of [distill] where not given)"
            )
        return alone

    @model_validator(mode="after")
    def _teacher_weights_fit_together(self) -> DistillSection:
        weights = self.teacher_weights
        if isinstance(weights, dict) and not sum(weights.values()):
            raise ValueError("teacher_weights gives every teacher the weight 0; at least one above 0 was expected")
        if weights == "fitted" and (self.teacher_temperatures or self.teacher_class_weights):
            raise ValueError(
                'teacher_weights = "fitted" fits temperatures and class weights too; give these keys only with a table '
                "of teacher_weights"
            )
        if self.teacher_class_weights and not isinstance(weights, dict):
            raise ValueError("teacher_class_weights needs teacher_weights, a table with a weight for each teacher")
        return self
