"""The pipeline file: TOML read into strict pydantic models.

Unknown keys are errors that name the nearest key; paths are relative to the recipe and made absolute here, so that no
later stage needs to know where the recipe lay. Hub names are kept as they are: a value is a path only if that path exists.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdcache.errors import RecipeError

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Precision = Literal["float32", "bf16", "fp16"]
Projection = Literal["none", "pca", "random"]
StoredDtype = Literal["float32", "float16", "int8"]
Head = Literal["shared", "own"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(_Section):
    """Where the examples come from. ``text`` holds one column, or two for pairs."""

    train: str
    validation: str | None = None
    validation_fraction: Fraction = 0.0  # split off train by text id, where there is no validation file
    test: str | None = None
    transfer: list[str] = []
    transfer_rows: Positive | None = None  # at most so many transfer texts, chosen by text id
    text: Annotated[list[str], Field(min_length=1, max_length=2)]
    label: str
    group: str | None = None
    labels: list[str] | None = None  # label names in class order; sorted as found where not given
    max_length: Positive = 128
    seed: int = 0
    licence: str = ""

    @model_validator(mode="after")
    def _one_source_of_validation(self) -> DataSection:
        if self.validation and self.validation_fraction:
            raise ValueError("give validation or validation_fraction, not both")
        return self


class TeacherSection(_Section):
    """One teacher. ``head = "own"`` takes an already fine-tuned classifier as it is."""

    name: Name
    model: str
    head: Head = "shared"
    revision: str | None = None
    max_length: Positive | None = None  # data.max_length where not given
    layers: list[int] | None = None  # dump.layers where not given
    licence: str = ""


class OptimSection(_Section):
    """What both trainings share. The schedule is linear warm-up, then linear decay to zero."""

    epochs: Positive = 3
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    warmup: Fraction = 0.1  # share of all optimizer steps
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    accumulation: Positive = 1  # micro-batches per optimizer step; batch_size is that of the step
    precision: Precision = "float32"
    checkpoint_steps: Positive = 200
    select_by: Literal["accuracy", "macro_f1", "matthews", "loss"] = "accuracy"
    seed: int = 0


class CofinetuneSection(OptimSection):
    """Joint training of the teachers (MT-BERT, section 3.1)."""

    pooling: Literal["attention", "cls", "mean"] = "attention"
    width: Positive | None = None  # of the shared space; the widest teacher where not given
    gradient_checkpointing: bool = False


class DumpSection(_Section):
    """What the cache stores of each teacher."""

    backend: Literal["torch", "onnxruntime"] = "torch"
    layers: Literal["even", "all", "last"] | list[int] = "even"
    projection: Projection = "pca"
    dim: Positive = 128
    dtype: StoredDtype = "int8"
    pooled: bool = False
    part_size: Positive = 4096  # texts
    sample_texts: Positive = 2048  # on which bases and variances are fitted
    tokens_per_batch: Positive = 4096  # padded tokens of one forward pass
    precision: Precision = "float32"
    seed: int = 0


class StudentSection(_Section):
    """The student: ``init_from`` is a hub name, a directory or ``teacher:NAME``; or ``config`` for random weights."""

    init_from: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None  # where init_from has none, or for config
    layers: Positive | list[int] | None = None  # the first K, or the (1-based) layers to keep; None keeps all
    head: Literal["standard", "shared"] = "standard"
    max_length: Positive | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> StudentSection:
        if (self.init_from is None) == (self.config is None):
            raise ValueError("give either init_from or config")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("config needs tokenizer: a hub name or a directory")
        return self


class WeightsSection(_Section):
    """Factors of the loss terms."""

    task: Annotated[float, Field(ge=0)] = 1.0
    soft: Annotated[float, Field(ge=0)] = 1.0
    hidden: Annotated[float, Field(ge=0)] = 0.1


class DistillSection(OptimSection):
    """Training of the student from cached (or live) targets."""

    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    method: str = "mt-bert"
    paper: bool = False  # plain sums, teacher-to-student, all weights 1
    temperature: Annotated[float, Field(gt=0)] = 1.0
    t_squared: bool = False
    hidden_direction: Literal["student-to-teacher", "teacher-to-student"] = "student-to-teacher"
    teachers: list[str] | None = None  # of the cache; all where not given
    teacher_layers: dict[str, list[int]] | None = None  # per teacher, one for each student layer; even where not given
    missing: Literal["error", "skip"] = "error"  # train rows whose text the cache lacks
    window: Positive = 8  # parts from which a batch is drawn
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None  # of the student; that of its config where not given
    weights: WeightsSection = WeightsSection()


class Recipe(_Section):
    """A whole pipeline. ``source`` is the file it came from, for messages and re-runs."""

    name: Name
    licence: str = ""
    data: DataSection
    teachers: list[TeacherSection] = []
    cofinetune: CofinetuneSection = CofinetuneSection()
    dump: DumpSection = DumpSection()
    student: StudentSection | None = None
    distill: DistillSection = DistillSection()

    @model_validator(mode="after")
    def _teachers_have_names_of_their_own(self) -> Recipe:
        names = [teacher.name for teacher in self.teachers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two teachers are called '{name}'; names must differ")
        return self

    def teacher(self, name: str) -> TeacherSection:
        """The teacher of that name; RecipeError names those there are."""
        for teacher in self.teachers:
            if teacher.name == name:
                return teacher
        known = ", ".join(teacher.name for teacher in self.teachers) or "none"
        raise RecipeError(
            f"recipe '{self.name}' has no teacher '{name}'; it has: {known}", "Name one of these, or add a [[teachers]] table."
        )

    def require_student(self) -> StudentSection:
        """The student section; RecipeError where the recipe has none."""
        if self.student is None:
            raise RecipeError(f"recipe '{self.name}' has no [student] section", "Add [student] with init_from.")
        return self.student


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a TOML recipe, apply ``section.key=value`` overrides, check it, make paths absolute.

    Raises RecipeError (exit 2) with the file, the key and the nearest known key.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RecipeError(f"there is no recipe '{path}'", "See the ones that come with kdcache: kdcache pipelines ls") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(
            f"recipe '{path}' is not readable TOML: {error}", "Check it with: kdcache pipelines validate"
        ) from error
    for override in overrides or []:
        _apply_override(document, override)
    try:
        recipe = Recipe.model_validate(document)
    except pydantic.ValidationError as error:
        raise _explain(error, path) from error
    return _absolute_paths(recipe, path.resolve().parent)


def dump_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML text, which ``load_recipe`` reads back to an equal recipe."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"override '{override}' is not of the form section.key=value", "Example: --set distill.seed=1")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, last = key.strip().split(".")
    table: Any = document
    for section in sections:
        if isinstance(table, list):
            table = _named_entry(table, section, override)
            continue
        table = table.setdefault(section, {})
        if not isinstance(table, dict | list):
            raise RecipeError(f"override '{override}': '{section}' is a value, not a section")
    if isinstance(table, list):
        raise RecipeError(f"override '{override}' names a list of tables", "Name the entry: --set teachers.NAME.model=DIR")
    table[last] = value


def _named_entry(tables: list[Any], name: str, override: str) -> dict[str, Any]:
    for table in tables:
        if isinstance(table, dict) and table.get("name") == name:
            return table
    known = ", ".join(str(table.get("name")) for table in tables if isinstance(table, dict))
    raise RecipeError(f"override '{override}': there is no entry '{name}'; there are: {known}")


def _explain(error: pydantic.ValidationError, path: Path) -> RecipeError:
    first = error.errors()[0]
    location = ".".join(str(step) for step in first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        near = difflib.get_close_matches(key, _known_keys(first["loc"][:-1]), n=1, cutoff=0.5)
        known = ", ".join(sorted(_known_keys(first["loc"][:-1])))
        hint = f"Did you mean '{near[0]}'?" if near else f"Known keys there: {known}."
        return RecipeError(f"recipe '{path}' has an unknown key '{location}'", hint)
    if first["type"] == "missing":
        return RecipeError(
            f"recipe '{path}' lacks the key '{location}'", "Add it; kdcache pipelines cp quickstart gives a full example."
        )
    reason = first["msg"].removeprefix("Value error, ")
    where = f" at '{location}'" if location else ""
    value = f" (given: {first['input']!r})" if isinstance(first["input"], str | int | float | bool | list) else ""
    return RecipeError(f"recipe '{path}' is wrong{where}: {reason}{value}")


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for step in location:
        if isinstance(step, int):
            continue
        annotation = model.model_fields[step].annotation if step in model.model_fields else None
        for candidate in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields)


S = TypeVar("S", bound=BaseModel)


def _absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    """Values that name something that exists beside the recipe become absolute; the rest are hub names."""

    def there(value: str) -> str:
        return str(base / value) if not Path(value).is_absolute() and (base / value).exists() else value

    def resolve(section: S, *keys: str) -> S:
        changed = {key: there(value) for key in keys if isinstance(value := getattr(section, key), str)}
        return section.model_copy(update=changed)

    data = resolve(recipe.data, "train", "validation", "test")
    data = data.model_copy(update={"transfer": [there(value) for value in data.transfer]})
    student = resolve(recipe.student, "init_from", "tokenizer") if recipe.student else None
    teachers = [resolve(teacher, "model") for teacher in recipe.teachers]
    return recipe.model_copy(update={"data": data, "teachers": teachers, "student": student})
