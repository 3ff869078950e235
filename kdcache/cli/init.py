"""``kdcache init``: a first recipe for one's own data."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.cli.options import Json
from kdcache.cli.output import out
from kdcache.errors import RecipeError

if TYPE_CHECKING:
    from kdcache.data.reading import Rows
    from kdcache.first.draft import Draft, Task
    from kdcache.first.files import Files, Split


def _files(about: str, flag: str) -> Any:
    return typer.Option(flag, metavar="FILE", help=about, show_default=False)


def init(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA...", help="Data files (or a hub data set); the split is guessed.", show_default=False
        ),
    ] = None,
    teachers: Annotated[
        list[str] | None,
        typer.Option("--teacher", metavar="NAME|DIR", help="A teacher. Repeatable.", show_default=False),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(metavar="NAME|DIR", help="What the student is cut from; also teacher:NAME.", show_default=False),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="COLUMN", help="Text column; twice for pairs.", show_default=False),
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Label column.", show_default=False)] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", metavar="CLASS", help="The classes in order, once per class.", show_default=False),
    ] = None,
    train: Annotated[str | None, _files("The training file.", "--train")] = None,
    validation: Annotated[str | None, _files("The validation file.", "--validation")] = None,
    test: Annotated[str | None, _files("The test file.", "--test")] = None,
    transfer: Annotated[list[str] | None, _files("Texts without labels. Repeatable.", "--transfer")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="RECIPE", help="Recipe to write; default: after the data.", show_default=False
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a recipe that exists.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; take the guesses.")] = False,
    json: Json = False,
) -> None:
    """Write a first recipe for your data, with comments: columns, splits, teachers and a student are guessed.

    It asks in a terminal, and asks nothing in a script, with --yes or with --json. Every guess is shown with its
    reason. The recipe is loaded with its data before it is written.

    Example: kdcache init train.csv test.csv

    Example: kdcache init reviews.jsonl --text body --label stars --teacher models/bert --teacher models/roberta --yes
    """
    from kdcache.files import create_file, replace_file
    from kdcache.first.draft import default_output, draft
    from kdcache.first.files import read_files

    given: dict[Split, list[str]] = {
        "train": [train] if train else [],
        "validation": [validation] if validation else [],
        "test": [test] if test else [],
        "transfer": transfer or [],
    }
    if not data and not train:
        raise RecipeError("no data file is given", "Name one: kdcache init FILE")
    asks = sys.stdin.isatty() and not yes and not json
    target = output or default_output(train or (data or [""])[0])
    if asks and output is None:
        target = Path(typer.prompt("Recipe to write", default=str(target), err=True))
    if target.is_dir():
        raise RecipeError(f"'{target}' is a directory; a recipe file was expected", f"--output {target / 'task.toml'}")
    if target.exists() and not replace:
        raise _exists(target)
    files = read_files(data or [], given, label)
    for line in files.why:
        out.note(line)
    task = _task(files.train, text or [], label, labels or [], asks=asks)
    chosen, student = _models(files.train, task, teachers or [], student, asks=asks)
    made = draft(files, task, chosen, student, target)
    _describe(made)
    if asks and not typer.confirm(f"Write {target}?", default=True, err=True):
        out.note("nothing was written")
        return
    if replace:
        replace_file(target, made.text.encode())
    elif not create_file(target, made.text.encode()):
        raise _exists(target)
    out.document(_document(made, task, files, target))
    out.text(str(target))
    out.hint(f"Check it with: kdcache pipelines validate {target}; then run it: kdcache run {target}")


def _exists(target: Path) -> RecipeError:
    return RecipeError(f"'{target}' exists already", "Give another file with --output, or replace it with --replace.")


def _task(train: Rows, text: list[str], label: str | None, labels: list[str], *, asks: bool) -> Task:
    """The columns, as flags or answers say, else guessed; each guess is shown."""
    from kdcache.first.columns import label_guesses, text_guess
    from kdcache.first.draft import understand

    if asks and label is None:
        out.note(f"columns of {train.source}: {', '.join(map(repr, train.columns))}")
        guesses = label_guesses(train, text)
        for guess in guesses:
            out.note(f"label column '{guess.columns[0]}': {guess.why}")
        label = typer.prompt("Label column", default=guesses[0].columns[0] if guesses else None, err=True)
    if asks and not text:
        first, *second = text_guess(train, label).columns
        text = [typer.prompt("Text column", default=first, err=True)]
        other = typer.prompt("Second text column, for pairs", default="".join(second) or "none", err=True)
        text += [] if other == "none" else [other]
    task = understand(train, text, label, labels)
    for line in task.why:
        out.note(line)
    return task


def _models(
    train: Rows, task: Task, teachers: list[str], student: str | None, *, asks: bool
) -> tuple[list[str], str | None]:
    """Teachers and student, as flags or answers say; empty and None where they are to be proposed."""
    if not asks:
        return teachers, student
    from kdcache.first.draft import propose, texts_of

    usual, usual_student = propose(texts_of(train, task.text))
    if not teachers:
        answer = typer.prompt("Teachers, hub names or directories", default=", ".join(usual), err=True)
        teachers = [name.strip() for name in answer.split(",") if name.strip()]
    if student is None:
        local = all(Path(teacher).expanduser().is_dir() for teacher in teachers)
        proposed = "the smallest teacher" if local else usual_student
        answer = typer.prompt("Student, a hub name or directory", default=proposed, err=True)
        student = None if answer == proposed else answer
    return teachers, student


def _describe(made: Draft) -> None:
    for teacher in made.recipe.teachers:
        how = "used as it is" if teacher.own else f"learning rate {teacher.learning_rate:g}"
        out.note(f"teacher {teacher.name}: {teacher.model}, {how}")
    layers = f", its first {made.recipe.layers} blocks" if made.recipe.layers else ""
    out.note(f"student: {made.recipe.student}{layers}")
    out.note(f"max_length {made.recipe.max_length}: {made.recipe.lengths}")
    for line in (*made.remarks, *(f"estimate: {line}" for line in made.costs.lines())):
        out.note(line)
    out.note("estimates are rough; kdcache plan RECIPE measures the dump once the teachers are trained")


def _document(made: Draft, task: Task, files: Files, target: Path) -> dict[str, Any]:
    return {
        "path": str(target),
        "recipe": asdict(made.recipe),
        "guesses": [*files.why, *task.why],
        "remarks": list(made.remarks),
        "estimate": asdict(made.costs),
    }
