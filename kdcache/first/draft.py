"""From files to a first recipe: the task as it is guessed, the models, the text, and the check that it loads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.data.labels import class_order, label_cells
from kdcache.data.task import load_task
from kdcache.data.texts import column_texts, has_text, ids_of
from kdcache.errors import DataError, RecipeError
from kdcache.files import absolute
from kdcache.first import models
from kdcache.first.columns import label_guesses, text_guess
from kdcache.first.costs import Costs, Work, estimate
from kdcache.first.files import Files, split_named
from kdcache.first.lengths import Lengths, measure
from kdcache.first.writing import MOST_LABELS, FirstRecipe, Teacher, quoted, recipe_text
from kdcache.progress import listed
from kdcache.recipe import parse_recipe

if TYPE_CHECKING:
    from kdcache.data.reading import Rows
    from kdcache.first.models import ModelFacts


@dataclass(frozen=True)
class Task:
    """Columns and classes. ``why``: a line for each that was guessed."""

    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    why: tuple[str, ...]


@dataclass(frozen=True)
class Draft:
    """A recipe that loads with its data, not written yet. ``remarks``: what the user should know of it."""

    recipe: FirstRecipe
    text: str
    costs: Costs
    remarks: tuple[str, ...]


def understand(train: Rows, text: Sequence[str] = (), label: str | None = None, labels: Sequence[str] = ()) -> Task:
    """The columns and classes of a task; what is given is not guessed.

    Raises:
        DataError: No column fits, several may be the label, or its values are no classes.
    """
    why = []
    if label is None:
        guesses = label_guesses(train, text)
        if len(guesses) != 1:
            raise _which_label(train, [guess.columns[0] for guess in guesses])
        (label,), reason = guesses[0].columns, guesses[0].why
        why.append(f"label column '{label}': {reason}")
    if not text:
        guess = text_guess(train, label)
        text = guess.columns
        why.append(f"text {'column' if len(text) == 1 else 'columns'} {listed(text, quoted=True)}: {guess.why}")
    if len(text) > 2:
        raise RecipeError(
            f"{len(text)} text columns are given: {listed(text, quoted=True)}; one or two were expected",
            "Give --text once, or twice for pairs.",
        )
    order = class_order(train, label_cells(train, label, labels), label, labels)
    if len(order.names) < 2:
        found = f"only the label '{order.names[0]}'" if order.names else f"no label in its column '{label}'"
        raise DataError(f"{train.source} has {found}; a classifier needs two or more", "Name the column with --label.")
    why.append(f"{len(order.names):,} classes: {listed(order.names, most=8)}")
    return Task(tuple(text), label, tuple(order.names), tuple(why))


def _which_label(train: Rows, candidates: Sequence[str]) -> DataError:
    if candidates:
        return DataError(
            f"several columns of {train.source} may be the label: {listed(candidates, quoted=True)}",
            f"Name it with --label, for example: --label {candidates[0]}",
        )
    return DataError(
        f"no column of {train.source} looks like a label; it has: {listed(train.columns, quoted=True)}",
        "Name it with --label.",
    )


def default_output(train: str) -> Path:
    """``NAME.toml`` here, after the file, or after its directory where the file has the name of a split."""
    path = Path(train)
    stem = path.stem if path.is_file() else train.partition(":")[0].rpartition("/")[2]
    if path.is_file() and split_named(train) is not None and stem.isalpha():
        stem = path.resolve().parent.name
    return Path(f"{models.plain_name(stem, 'task')}.toml")


def propose(texts: Sequence[tuple[str, ...]]) -> tuple[list[str], str]:
    """Teachers and a student for the texts where none are given."""
    latin = measure(texts).latin
    teachers = models.LATIN_TEACHERS if latin else models.OTHER_TEACHERS
    student = models.LATIN_STUDENT if latin else models.OTHER_STUDENT
    return [facts.model for facts in teachers], student.model


def texts_of(rows: Rows, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The rows that have text. Raises DataError for a missing column, text that is not Unicode, and no text at all."""
    every = column_texts(rows, columns)
    ids_of(rows, every)
    texts = [text for text in every if has_text(text)]
    if not texts:
        raise DataError(
            f"{rows.source} has no text in any row of {listed(columns, quoted=True)}", "Name the column with --text."
        )
    return texts


@dataclass(frozen=True)
class _Models:
    """Teachers with their tables, and the student: ``origin`` is its ``init_from``."""

    teachers: tuple[ModelFacts, ...]
    tables: tuple[Teacher, ...]
    student: ModelFacts
    origin: str

    @property
    def every(self) -> tuple[ModelFacts, ...]:
        return (*self.teachers, self.student)

    @property
    def trained(self) -> list[ModelFacts]:
        """The teachers that are co-finetuned."""
        return [facts for facts, table in zip(self.teachers, self.tables, strict=True) if not table.own]


def draft(files: Files, task: Task, teachers: Sequence[str], student: str | None, output: Path) -> Draft:
    """The recipe for ``files``, loaded once with its data.

    Args:
        files: The files with their splits.
        task: Columns and classes.
        teachers: Directories or hub names; proposed where empty.
        student: A directory, a hub name or ``teacher:NAME``; proposed where None.
        output: The file that the recipe is for.

    Raises:
        DataError: The data cannot be used as the recipe says.
        RecipeError: A model is neither a directory nor a hub name, or a name cannot be written.
    """
    texts = texts_of(files.train, task.text)
    chosen = _choose(task, teachers, student, propose(texts), output)
    tokenizer = next((file for one in chosen.every if (file := one.tokenizer_file)), None)
    lengths = measure(texts, tokenizer)
    recipe = _recipe(files, task, chosen, lengths, len(texts), output)
    work = Work(
        train=round(len(texts) * (1 - recipe.validation_fraction)),
        texts=sum(len(rows) for rows in (files.train, files.validation, files.test, *files.transfer) if rows),
        tokens=min(lengths.mean, recipe.max_length),
        cofinetune_epochs=recipe.cofinetune_epochs,
        distill_epochs=recipe.distill_epochs,
    )
    costs = estimate(work, chosen.trained, chosen.teachers, chosen.student, recipe.layers)
    recipe = replace(recipe, costs=tuple(costs.lines()))
    return Draft(recipe, _loaded(recipe_text(recipe), output), costs, _remarks(chosen, recipe))


def _loaded(text: str, output: Path) -> str:
    """``text`` after it has been read as a recipe, and its data with it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"a name holds the character {text[error.start]!a}, which is no Unicode; a recipe cannot hold it",
            "Rename the column, the class or the file.",
        ) from error
    load_task(parse_recipe(text, output).data)
    return text


def _choose(
    task: Task, teachers: Sequence[str], student: str | None, proposed: tuple[list[str], str], output: Path
) -> _Models:
    facts = tuple(models.model_facts(model) for model in teachers or proposed[0])
    names = models.teacher_names(facts)
    tables = tuple(_table(name, one, task, output) for name, one in zip(names, facts, strict=True))
    if student is None:
        local = all(one.directory for one in facts)
        smallest = min(range(len(facts)), key=lambda place: facts[place].encoder_parameters)
        student = f"teacher:{names[smallest]}" if local else proposed[1]
    if student.startswith("teacher:"):
        name = student.removeprefix("teacher:")
        if name not in names:
            raise RecipeError(
                f"--student is '{student}', but the teachers are: {', '.join(names)}", "Name one of them."
            )
        return _Models(facts, tables, facts[names.index(name)], student)
    of_student = models.model_facts(student)
    return _Models(facts, tables, of_student, _model_path(of_student, output))


def _table(name: str, facts: ModelFacts, task: Task, output: Path) -> Teacher:
    own = models.has_these_classes(facts, task.labels)
    remark = ""
    if facts.classes and not own:
        remark = f'a classifier of other labels, {quoted(facts.classes[:8])}; with head = "own" it keeps its classifier'
    rate = None if own else models.learning_rate(facts)
    return Teacher(name, _model_path(facts, output), rate, own=own, licence=facts.licence, remark=remark)


def _recipe(files: Files, task: Task, chosen: _Models, lengths: Lengths, rows: int, output: Path) -> FirstRecipe:
    rates = [table.learning_rate for table in chosen.tables if table.learning_rate is not None]
    fraction = 0.1 if rows >= 1000 else 0.2 if rows >= 100 else 0.3
    how = "measured" if lengths.measured else "estimated from words"
    student = chosen.student
    return FirstRecipe(
        name=models.plain_name(output.stem, "task"),
        train=_data_path(files.train, output),
        text=task.text,
        label=task.label,
        teachers=chosen.tables,
        student=chosen.origin,
        labels=task.labels if len(task.labels) <= MOST_LABELS else (),
        validation=_data_path(files.validation, output) if files.validation else None,
        validation_fraction=0.0 if files.validation else fraction,
        test=_data_path(files.test, output) if files.test else None,
        transfer=tuple(_data_path(one, output) for one in files.transfer),
        max_length=lengths.max_length(min((one.positions for one in chosen.every if one.positions), default=None)),
        lengths=f"99 of 100 texts have at most {lengths.high:.0f} ({how})",
        layers=max(1, student.blocks // 2) if student.known else None,
        dim=min([128, *(one.width for one in chosen.teachers if one.width)]),
        distill_epochs=3 if rows >= 10_000 else 6 if rows >= 2_000 else 10,
        learning_rate=min(rates, default=3e-5),
        student_learning_rate=2e-4 if 0 < student.width < 768 else 5e-5,
    )


def _data_path(rows: Rows, output: Path) -> str:
    return _written(rows.source, output) if Path(rows.source).expanduser().is_file() else rows.source


def _model_path(facts: ModelFacts, output: Path) -> str:
    return facts.model if facts.directory is None else _written(facts.model, output)


def _written(source: str, output: Path) -> str:
    """A path as the recipe has it: relative to the recipe if both are below one working directory, else absolute.

    Absolute too where the recipe's directory is still to be made: nothing can be found from there yet.
    """
    path, base, here = absolute(Path(source).expanduser()), output.resolve().parent, Path.cwd().resolve()
    if path.is_relative_to(base):
        return "./" + path.relative_to(base).as_posix()
    if path.is_relative_to(here) and base.is_relative_to(here) and base.is_dir():
        return Path(os.path.relpath(path, base)).as_posix()
    return path.as_posix()


def _remarks(chosen: _Models, recipe: FirstRecipe) -> tuple[str, ...]:
    remarks = []
    hub = list(dict.fromkeys(one.model for one in chosen.every if one.directory is None))
    if hub:
        remarks.append(f"fetched from the model hub when they are first used: {listed(hub)}; or give directories")
    unknown = [one.model for one in chosen.every if not one.known]
    if unknown:
        remarks.append(f"size not known, estimated as BERT-base: {listed(unknown)}")
    if recipe.validation is None:
        remarks.append(f"no validation file: {recipe.validation_fraction:g} of train is split off")
    if len(recipe.teachers) == 1:
        remarks.append("one teacher; several of different architectures teach more")
    return tuple(remarks)
