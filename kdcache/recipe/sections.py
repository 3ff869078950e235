"""The sections of a recipe: every key with its type, its bounds and its default."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from kdcache.errors import MismatchError, RecipeError
from kdcache.progress import listed
from kdcache.recipe.sweep import SweepSection  # noqa: TC001 - pydantic reads annotations at run time

DATA_FILE_ENDINGS = (".tsv", ".csv", ".jsonl", ".ndjson", ".parquet")

T = TypeVar("T")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _distinct(values: list[T]) -> list[T]:
    counts = Counter(values)
    often = [repr(value) for value in values if counts[value] > 1]
    if often:
        raise ValueError(f"each may be named once, but these are named more often: [{listed(often)}]")
    return values


def _which_layer(name: str) -> str:
    if name not in ("all", "last") and not (name.isdecimal() and str(int(name)) == name):
        raise ValueError(f'\'{name}\' is no layer: give its number, "last" or "all"')
    return name


def _equal_is_none(value: Any) -> Any:
    """``equal`` is the absence of the key, so that records of recipes are those of 0.1.0."""
    if isinstance(value, str) and value not in ("equal", "fitted"):
        expected = "'equal', 'fitted' or a table {NAME = 0.7, ...}"
        raise PydanticCustomError("literal_error", "{expected} was expected", {"expected": expected})
    return None if value == "equal" else value


def _storage_format(spelling: str) -> str:
    from kdcache.codecs.registry import storage_formats, stored_name

    try:
        return stored_name(spelling)
    except MismatchError as error:
        titles = [f"'{known.title}'" for known in storage_formats().values()]
        expected = f"{', '.join(titles[:-1])} or {titles[-1]}"
        raise PydanticCustomError("literal_error", "{expected} was expected", {"expected": expected}) from error


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
AboveZero = Annotated[float, Field(gt=0.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy, torch and Python's own generators all take
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\z")]
NonEmpty = Annotated[str, Field(min_length=1)]
Strings = Annotated[
    list[NonEmpty], BeforeValidator(_listed), AfterValidator(_distinct)
]  # one string may stand for a list of one
LayerNumbers = Annotated[list[Count], Field(min_length=1), AfterValidator(_distinct)]  # 0 = embeddings
BlockNumbers = Annotated[list[Positive], Field(min_length=1), AfterValidator(_distinct)]
Precision = Literal["float32", "bf16", "fp16"]
Projection = Literal["none", "pca", "random"]
StoredDtype = Annotated[str, AfterValidator(_storage_format)]  # a name of kdcache.codecs.registry
TokenSelection = Literal["all", "first", "pooled"]
WhichLayer = Annotated[str, AfterValidator(_which_layer)]
TeacherWeights = Literal["fitted"] | Annotated[dict[str, NotNegative], Field(min_length=1)]
Head = Literal["shared", "own"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSection(_Section):
    """Where the examples come from. ``text`` holds one column, or two for pairs."""

    train: NonEmpty  # a file (tsv, csv, jsonl, parquet), or a hub data set: NAME, NAME:CONFIG, NAME:CONFIG/SPLIT
    validation: NonEmpty | None = None
    validation_fraction: Fraction = 0.0  # split off train by text id, where there is no validation file
    test: NonEmpty | None = None
    transfer: Strings = []  # texts without labels, for the teachers and the distillation only
    transfer_rows: Positive | None = None  # at most so many transfer texts, chosen by text id
    text: Annotated[Strings, Field(min_length=1, max_length=2)]
    label: NonEmpty
    group: NonEmpty | None = None
    labels: Annotated[Strings, Field(min_length=2)] | None = None  # in class order; default: sorted
    max_length: Positive = 128
    seed: Seed = 0
    licence: str = ""

    @model_validator(mode="after")
    def _keys_that_fit_together(self) -> DataSection:
        if self.validation and self.validation_fraction:
            raise ValueError("give validation or validation_fraction, not both")
        if self.label in self.text:
            raise ValueError(f"the column '{self.label}' is both text and label")
        return self


class StoredSection(_Section):
    """How a layer is stored if not as in ``[dump]``; keys that are not given are as there."""

    projection: Projection | None = None
    dim: Positive | None = None
    dtype: StoredDtype | None = None
    bytes: Positive | None = None  # of a row, for dtype "trellis"
    tokens: TokenSelection | None = None


PerLayer = dict[WhichLayer, StoredSection]  # "12", "last" or "all"; a number wins over "last", "last" over "all"


class TeacherSection(_Section):
    """One teacher. ``head = "own"`` takes an already fine-tuned classifier as it is."""

    name: Name
    model: NonEmpty
    head: Head = "shared"
    revision: str | None = None
    trust_remote_code: bool = False  # run the Python code that comes with the model
    max_length: Positive | None = None  # data.max_length where not given
    learning_rate: AboveZero | None = None  # of its co-finetuning; cofinetune.learning_rate where not given
    layers: LayerNumbers | None = None  # dump.layers where not given
    per_layer: PerLayer = {}  # wins over dump.per_layer
    licence: str = ""

    @model_validator(mode="after")
    def _own_heads_are_not_trained(self) -> TeacherSection:
        if self.head == "own" and self.learning_rate is not None:
            raise ValueError(
                f"learning_rate = {self.learning_rate} has no effect on teacher '{self.name}': head = \"own\" is not "
                "trained; remove one of them"
            )
        return self


def _unless(usual: str) -> AfterValidator:
    """Turns the default, written out, into None: so it is what runs of earlier versions had."""
    return AfterValidator(lambda value: None if value == usual else value)


AnySchedule = Literal["linear", "cosine", "constant"]
Schedule = Annotated[AnySchedule | None, _unless("linear")]
Rows = Annotated[Literal["all", "train", "labelled"] | None, _unless("all")]


class OptimSection(_Section):
    """Keys of both trainings.

    After a linear warm-up the learning rate falls to zero, linearly or as a cosine, or stays constant.
    """

    epochs: Positive = 3
    batch_size: Positive = 32
    learning_rate: AboveZero = 2e-5
    warmup: Fraction = 0.1  # share of all optimizer steps
    schedule: Schedule = None  # after the warm-up: linear (default) or cosine to zero, or constant
    weight_decay: NotNegative = 0.01
    max_grad_norm: AboveZero = 1.0
    accumulation: Positive = 1  # micro-batches per optimizer step; batch_size is that of the step
    precision: Precision = "float32"
    checkpoint_steps: Positive = 200
    select_by: Literal["accuracy", "macro_f1", "matthews", "loss"] = "accuracy"
    evaluate_steps: Positive | None = None  # evaluate on validation every so many steps too, not only after each epoch
    patience: Positive | None = None  # stop after so many evaluations in a row without a better score
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # decay of averaged weights, which are then evaluated
    seed: Seed = 0

    @model_validator(mode="after")
    def _micro_batches_have_rows(self) -> OptimSection:
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation {self.accumulation} cuts a batch of {self.batch_size} into more pieces than it has rows"
            )
        return self


class CofinetuneSection(OptimSection):
    """Joint training of the teachers (MT-BERT, section 3.1)."""

    pooling: Literal["attention", "cls", "mean", "last"] = "attention"
    width: Positive | None = None  # of the shared space; the widest teacher where not given
    gradient_checkpointing: bool = False


class DumpSection(_Section):
    """What the cache stores of each teacher.

    With ``dtype = "trellis"`` a row takes ``bytes`` bytes and ``dim`` is ignored: the bits go to the PCA dimensions
    where they reduce the error most.
    """

    backend: Literal["torch", "onnxruntime"] = "torch"
    layers: Literal["even", "all", "last", "none"] | LayerNumbers = "even"
    projection: Projection = "pca"
    dim: Positive = 128
    dtype: StoredDtype = "int8"
    bytes: Positive | None = None  # of a token and layer, for dtype "trellis"
    tokens: TokenSelection = "all"  # a target for every token, for the first one, or for the mean of a text's tokens
    per_layer: PerLayer = {}  # what differs in some layers: per_layer = { 12 = { dtype = "trellis", bytes = 192 } }
    pooled: bool = False
    hidden_transfer: Count | None = None  # transfer texts that get hidden states, by text id; None: all of them
    part_size: Positive = 4096  # texts
    sample_texts: Positive = 2048  # on which bases and variances are fitted
    tokens_per_batch: Positive = 4096  # padded tokens of one forward pass
    precision: Precision = "float32"
    seed: Seed = 0

    @model_validator(mode="after")
    def _storage_is_consistent(self) -> DumpSection:
        check_stored(self.stored())
        for which, section in self.per_layer.items():
            check_stored(overlaid(self.stored(), section), f"per_layer.{which}: ")
        return self

    def stored(self) -> StoredSection:
        """How a layer without ``per_layer`` keys is stored."""
        return StoredSection(
            projection=self.projection, dim=self.dim, dtype=self.dtype, bytes=self.bytes, tokens=self.tokens
        )


def overlaid(below: StoredSection, above: StoredSection) -> StoredSection:
    """``below`` with the keys of ``above``; a dtype without bytes removes ``bytes``, one with bytes implies pca."""
    from kdcache.codecs.registry import storage_format

    given = above.model_dump(exclude_none=True)
    if "dtype" in given:
        by_bytes = storage_format(given["dtype"]).by_bytes
        given.setdefault(*(("projection", "pca") if by_bytes else ("bytes", None)))
    return below.model_copy(update=given)


def check_stored(stored: StoredSection, where: str = "") -> None:
    """Raises ValueError if dtype, bytes and projection do not fit together; ``where`` begins the message."""
    from kdcache.codecs.registry import storage_format, storage_formats

    assert stored.dtype is not None
    storage = storage_format(stored.dtype)
    if stored.bytes is not None and not storage.by_bytes:
        others = " or ".join(f'"{known.title}"' for known in storage_formats().values() if known.by_bytes)
        raise ValueError(f'{where}bytes = {stored.bytes} goes with dtype = {others}; with "{storage.title}" set dim')
    try:
        storage.check_keys(stored.projection, stored.bytes)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


class StudentSection(_Section):
    """The student: ``init_from`` is a hub name, a directory or ``teacher:NAME``; or ``config`` for random weights."""

    init_from: NonEmpty | None = None
    config: dict[str, Any] | None = None
    tokenizer: NonEmpty | None = None  # where init_from has none, or for config
    layers: Positive | BlockNumbers | None = None  # the first K, or the (1-based) layers to keep; None keeps all
    head: Literal["standard", "shared"] = "standard"
    max_length: Positive | None = None
    trust_remote_code: bool = False  # run the Python code that comes with the model or its tokenizer

    @model_validator(mode="after")
    def _one_origin(self) -> StudentSection:
        if (self.init_from is None) == (self.config is None):
            raise ValueError("give either init_from or config")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("config needs tokenizer: a hub name or a directory")
        return self


class WeightsSection(_Section):
    """Factors of the loss terms."""

    task: NotNegative = 1.0
    soft: NotNegative = 1.0
    hidden: NotNegative = 0.1


class StageWeights(_Section):
    """Factors of the loss terms in a stage; those of ``distill.weights`` where not given."""

    task: NotNegative | None = None
    soft: NotNegative | None = None
    hidden: NotNegative | None = None


class StageSection(_Section):
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


class DistillSection(OptimSection):
    """Training of the student from cached (or live) targets."""

    learning_rate: AboveZero = 5e-5
    projection_learning_rate: AboveZero | None = None  # of the W_ij; else ten times learning_rate, once with paper
    method: str = "mt-bert"
    paper: bool = False  # plain sums, teacher-to-student, all weights 1
    temperature: AboveZero = 1.0
    t_squared: bool = False
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
    window: Positive | Literal["all"] = 8  # parts from which a batch is drawn; all: a uniform shuffle
    rows: Rows = None  # what to learn from: all (default), train without transfer texts, or labelled rows only
    dropout: Fraction | None = None  # of the student; that of its config where not given
    weights: WeightsSection = WeightsSection()
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

    def without_teachers(self) -> DistillSection:
        """The settings of the baseline: the same training on gold labels alone, in as many stages."""
        of_teachers = {"method": None, "temperature": None, "t_squared": None, "weights": StageWeights()}
        stages = self.stages and [stage.model_copy(update=of_teachers) for stage in self.stages]
        return self.model_copy(update={"method": "fine-tune", "paper": False, "stages": stages})

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


class Recipe(_Section):
    """A whole pipeline."""

    name: Name
    licence: str = ""
    data: DataSection
    teachers: list[TeacherSection] = []
    cofinetune: CofinetuneSection = CofinetuneSection()
    dump: DumpSection = DumpSection()
    student: StudentSection | None = None
    distill: DistillSection = DistillSection()
    sweep: SweepSection | None = None

    @model_validator(mode="after")
    def _teachers_can_be_told_apart(self) -> Recipe:
        names = [teacher.name for teacher in self.teachers]
        for position, name in enumerate(names):
            if name.lower() in (
                other.lower() for other in names[:position]
            ):  # directories that ignore case would be one
                raise ValueError(f"two teachers are called '{name}'; names must differ, and not by case alone")
        origin = (self.student.init_from or "") if self.student else ""
        if names and origin.startswith("teacher:") and origin.removeprefix("teacher:") not in names:
            raise ValueError(f"student.init_from is '{origin}', but the teachers are: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _storage_of_teachers_is_consistent(self) -> Recipe:
        for teacher in self.teachers:
            for which in teacher.per_layer:
                check_stored(self.stored(teacher, (which,)), f"teachers.{teacher.name}.per_layer.{which}: ")
        return self

    def stored(self, teacher: TeacherSection, names: Sequence[str]) -> StoredSection:
        """How a layer is stored whose ``per_layer`` keys may be ``names``; later names and the teacher's table win."""
        stored = self.dump.stored()
        for table in (self.dump.per_layer, teacher.per_layer):
            for name in names:
                stored = overlaid(stored, table[name]) if name in table else stored
        return stored

    def trusted(self) -> frozenset[str]:
        """Names of the teachers whose Python code may run."""
        return frozenset(teacher.name for teacher in self.teachers if teacher.trust_remote_code)

    def teacher(self, name: str) -> TeacherSection:
        """The teacher of that name. Raises RecipeError, which lists the known ones."""
        for teacher in self.teachers:
            if teacher.name == name:
                return teacher
        known = ", ".join(teacher.name for teacher in self.teachers) or "none"
        raise RecipeError(
            f"recipe '{self.name}' has no teacher '{name}'; it has: {known}",
            "Name one of these, or add a [[teachers]] table.",
        )

    def require_student(self) -> StudentSection:
        """The student section. Raises RecipeError if the recipe has none."""
        if self.student is None:
            raise RecipeError(f"recipe '{self.name}' has no [student] section", "Add [student] with init_from.")
        return self.student
