"""A recipe: data, teachers, and the sections of dump and trainings, with what must fit together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator

from kdcache.errors import RecipeError
from kdcache.recipe.storage import DumpSection, PerLayer, StoredSection, check_stored, overlaid
from kdcache.recipe.sweep import SweepSection  # noqa: TC001 - pydantic reads annotations at run time
from kdcache.recipe.training import BaselineSection, CofinetuneSection, DistillSection, StudentSection
from kdcache.recipe.values import (
    AboveZero,
    Fraction,
    Head,
    LayerNumbers,
    Name,
    NonEmpty,
    Positive,
    Section,
    Seed,
    Strings,
)

DATA_FILE_ENDINGS = (".tsv", ".csv", ".jsonl", ".ndjson", ".parquet")


class DataSection(Section):
    """Where the examples come from. ``text`` holds one column, or two for pairs."""

    train: NonEmpty  # a file (tsv, csv, jsonl, parquet), or a hub data set: NAME, NAME:CONFIG, NAME:CONFIG/SPLIT
    validation: NonEmpty | None = None  # as train; models are chosen by it
    validation_fraction: Fraction = 0.0  # split off train by text id, where there is no validation file
    test: NonEmpty | None = None  # as train; scored once, at the end
    transfer: Strings = Field(default=[])  # texts without labels, for the teachers and the distillation only
    transfer_rows: Positive | None = None  # at most so many transfer texts, chosen by text id
    text: Annotated[Strings, Field(min_length=1, max_length=2)]  # the text column, or two columns for pairs
    label: NonEmpty  # the label column: strings or whole numbers
    group: NonEmpty | None = None  # a column that is kept with the examples; it changes no training
    labels: Annotated[Strings, Field(min_length=2)] | None = None  # in class order; default: sorted
    max_length: Positive = 128  # tokens; longer texts are truncated
    seed: Seed = 0  # of validation_fraction, transfer_rows and dump.hidden_transfer
    licence: str = ""  # of the data, for the cards of cache and student

    @model_validator(mode="after")
    def _keys_that_fit_together(self) -> DataSection:
        if self.validation and self.validation_fraction:
            raise ValueError("give validation or validation_fraction, not both")
        if self.label in self.text:
            raise ValueError(f"the column '{self.label}' is both text and label")
        return self


class TeacherSection(Section):
    """One teacher. ``head = "own"`` takes an already fine-tuned classifier as it is."""

    name: Name  # names its files, columns and settings
    model: NonEmpty  # a hub name or a directory
    head: Head = "shared"  # shared: co-finetuned under the shared head; own: a fine-tuned classifier as it is
    revision: str | None = None  # of a hub name: branch, tag or commit
    trust_remote_code: bool = False  # run the Python code that comes with the model
    max_length: Positive | None = None  # data.max_length where not given
    learning_rate: AboveZero | None = None  # of its co-finetuning; cofinetune.learning_rate where not given
    layers: LayerNumbers | None = None  # dump.layers where not given
    per_layer: PerLayer = Field(default_factory=dict)  # wins over dump.per_layer
    licence: str = ""  # of the model, for the cards

    @model_validator(mode="after")
    def _own_heads_are_not_trained(self) -> TeacherSection:
        if self.head == "own" and self.learning_rate is not None:
            raise ValueError(
                f"learning_rate = {self.learning_rate} has no effect on teacher '{self.name}': head = \"own\" is not "
                "trained; remove one of them"
            )
        return self


class Recipe(Section):
    """A whole pipeline."""

    name: Name  # of the run directory, runs/NAME
    licence: str = ""  # of what is made, for the cards
    data: DataSection  # the examples
    teachers: list[TeacherSection] = Field(default=[])  # one table for each
    cofinetune: CofinetuneSection = CofinetuneSection()  # joint training of the teachers
    dump: DumpSection = DumpSection()  # what the cache stores
    student: StudentSection | None = None  # the model that learns
    distill: DistillSection = DistillSection()  # its training
    baseline: BaselineSection | None = None  # its training without teachers, for comparison, where it differs
    sweep: SweepSection | None = None  # many students from one cache

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
    def _baseline_is_possible(self) -> Recipe:
        self.without_teachers()
        return self

    @model_validator(mode="after")
    def _storage_of_teachers_is_consistent(self) -> Recipe:
        for teacher in self.teachers:
            for which in teacher.per_layer:
                check_stored(self.stored(teacher, (which,)), f"teachers.{teacher.name}.per_layer.{which}: ")
        return self

    def without_teachers(self) -> DistillSection:
        """The training of the baseline: the student without teachers."""
        return self.distill.without_teachers(self.baseline)

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
