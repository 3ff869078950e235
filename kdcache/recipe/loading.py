"""Reads a recipe file and ``--set`` overrides into a checked ``Recipe`` with absolute paths; writes it back as TOML.

Read from top to bottom: reading the file, overrides, paths, and then the messages, which say what pydantic found wrong
in the words of the recipe: the key as the user wrote it, the value, what was expected, and the nearest known key.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import pydantic
from pydantic import BaseModel

from kdcache.errors import RecipeError
from kdcache.files import absolute
from kdcache.recipe.sections import DATA_FILE_ENDINGS, Recipe

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


S = TypeVar("S", bound=pydantic.BaseModel)


def load_recipe(
    path: str | Path, overrides: Sequence[str] | None = None, values: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a TOML recipe, apply ``section.key=value`` overrides, check it, make paths absolute.

    Paths are relative to the recipe or, if nothing exists there, to the working directory (for overrides).

    Args:
        path: The recipe file.
        overrides: ``section.key=value`` each, as for ``--set``.
        values: more overrides, applied last: dotted key to value.

    Returns:
        The checked recipe.

    Raises:
        RecipeError: Names the file, the key and the nearest known key (exit code 2).
    """
    path = Path(path)
    document = _read(path)
    for override in overrides or []:
        _apply_override(document, override)
    for key, value in (values or {}).items():
        _set_value(document, [step.strip() for step in key.split(".")], value, f"{key}={_shown(value)}")
    return _checked(document, path)


def parse_recipe(text: str, path: Path) -> Recipe:
    """The recipe that ``text`` would be in the file ``path``, as ``load_recipe`` gives it. Raises RecipeError."""
    return _checked(_parsed(text, path), path)


def _checked(document: dict[str, Any], path: Path) -> Recipe:
    try:
        recipe = Recipe.model_validate(document, strict=True)
    except pydantic.ValidationError as error:
        raise explain(error, path, document) from error
    return _absolute_paths(recipe, path.resolve().parent)


def with_values(recipe: Recipe, values: Mapping[str, Any] | None) -> Recipe:
    """``recipe`` with other values by dotted key, checked. Raises RecipeError."""
    if not values:
        return recipe
    document = recipe.model_dump(mode="json", exclude_none=True)
    for key, value in values.items():
        _set_value(document, [step.strip() for step in key.split(".")], value, f"{key}={_shown(value)}")
    try:
        changed = Recipe.model_validate(document, strict=True)
    except pydantic.ValidationError as error:
        raise explain(error, Path(recipe.name), document) from error
    return _absolute_paths(changed, Path.cwd())


def dump_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML text, which ``load_recipe`` reads back to an equal recipe."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RecipeError(
            f"there is no recipe '{path.absolute()}'",
            "Write one with kdcache init, or see those that come with kdcache: kdcache pipelines ls",
        ) from error
    except IsADirectoryError as error:
        raise RecipeError(
            f"'{path}' is a directory; a recipe file was expected", "Name the .toml file in it."
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"recipe '{path}' is not UTF-8: {error.reason} at byte {error.start}", "Save it as UTF-8."
        ) from error
    except OSError as error:
        raise RecipeError(
            f"recipe '{path}' cannot be read: {error.strerror}", "Check the file and its permissions."
        ) from error
    return _parsed(text, path)


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            f"recipe '{path}' is not TOML: {error}", "Strings need quotation marks, sections brackets."
        ) from error


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    steps = [step.strip() for step in key.split(".")]
    if not equals or not all(steps):
        raise RecipeError(
            f"override '{override}' is not of the form section.key=value", "Example: --set distill.seed=1"
        )
    _set_value(document, steps, _override_value(text), override)


def _set_value(document: dict[str, Any], steps: Sequence[str], value: Any, override: str) -> None:
    *sections, last = steps
    table = document
    while sections:
        section = sections.pop(0)
        if section == "teachers" and table is document:
            table = _teacher(document.get("teachers"), sections, override)
            continue
        if section == "stages" and isinstance(table.get(section), list):
            table = _stage(table[section], sections, override)
            continue
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"override '{override}': '{section}' is a value, not a section", "Set the value itself.")
    table[last] = value


def _override_value(text: str) -> Any:
    """The value as TOML; if that fails, as a string."""
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return read["value"] if len(read) == 1 else text


def _teacher(tables: Any, steps: list[str], override: str) -> dict[str, Any]:
    """The table of the teacher named next; removes its name, which may contain dots, from ``steps``."""
    entries = [table for table in tables if isinstance(table, dict)] if isinstance(tables, list) else []
    for length in range(len(steps), 0, -1):
        for table in entries:
            if table.get("name") == ".".join(steps[:length]):
                del steps[:length]
                return table
    known = ", ".join(str(table.get("name")) for table in entries) or "none"
    if not steps:
        raise RecipeError(
            f"override '{override}' does not say which teacher; there are: {known}", "--set teachers.NAME.model=DIR"
        )
    raise RecipeError(
        f"override '{override}': there is no teacher '{'.'.join(steps)}'; there are: {known}",
        "Teachers are added in the recipe.",
    )


def _stage(tables: list[Any], steps: list[str], override: str) -> dict[str, Any]:
    """The table of the stage whose number (from 1) comes next; removes it from ``steps``."""
    number = steps.pop(0) if steps else ""
    place = int(number) - 1 if number.isdecimal() else -1
    if not (0 <= place < len(tables) and isinstance(tables[place], dict)):
        raise RecipeError(
            f"override '{override}': there is no stage '{number}'; there are {len(tables)}, counted from 1",
            "--set distill.stages.1.epochs=2",
        )
    table: dict[str, Any] = tables[place]
    return table


def _absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    """Make values that name a file or directory absolute; others are hub names and stay."""

    def resolved(value: str) -> str:
        path = Path(value).expanduser()
        for root in (base, Path.cwd()):
            if (root / path).exists():
                return str(absolute(root / path))
        means_a_path = value.startswith((".", "~", "/")) or path.suffix.lower() in DATA_FILE_ENDINGS
        return str(base / path) if means_a_path else value

    def with_paths(section: S, *keys: str) -> S:
        changed = {key: resolved(value) for key in keys if isinstance(value := getattr(section, key), str)}
        return section.model_copy(update=changed)

    data = with_paths(recipe.data, "train", "validation", "test")
    data = data.model_copy(update={"transfer": [resolved(value) for value in data.transfer]})
    student = with_paths(recipe.student, "init_from", "tokenizer") if recipe.student else None
    teachers = [with_paths(teacher, "model") for teacher in recipe.teachers]
    return recipe.model_copy(update={"data": data, "teachers": teachers, "student": student})


_EXAMPLE = "kdcache pipelines cp quickstart gives a full example."
_EXPECTED = {  # pydantic's error type -> what was expected; other types keep pydantic's message
    "string_type": "a string, in quotation marks,",
    "string_too_short": "a string that is not empty",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list, in brackets,",
    "dict_type": "a section",
    "model_type": "a section",
    "model_attributes_type": "a section",
    "string_pattern_mismatch": "up to 64 letters, digits, '.', '_' and '-', the first a letter or digit,",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "literal_error": "{expected}",
}
_WRONG_KIND = ("literal_error", "list_type", "int_type")


def explain(error: pydantic.ValidationError, path: Path, document: dict[str, Any]) -> RecipeError:
    """The first problem as a RecipeError, with the number of the others."""
    problems: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for detail in error.errors():
        problems.setdefault(_key_steps(detail["loc"]), []).append(detail)
    steps, details = next(iter(problems.items()))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    details = _telling(details)
    location, kind = _location(steps, document), details[0]["type"]
    if kind == "extra_forbidden":
        hint = _nearest(str(steps[-1]), _known_keys(steps[:-1]))
        return RecipeError(f"recipe '{path}' has an unknown key '{location}'{more}", hint)
    if kind == "missing":
        return RecipeError(f"recipe '{path}' lacks the key '{location}'{more}", f"Add it; {_EXAMPLE}")
    reasons = ", or ".join(dict.fromkeys(_reason(detail) for detail in details))
    if kind == "value_error":
        return RecipeError(f"recipe '{path}'{f', {location}' if location else ''}: {reasons}{more}")
    given = _shown(details[0]["input"] if len(details[0]["loc"]) == len(steps) else _value(document, steps))
    return RecipeError(f"recipe '{path}': {location} is {given}; {reasons} was expected{more}", _hint(steps, details))


def _telling(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """The errors of the union members that the value was meant for: those that fail by content, not by type."""
    return [detail for detail in details if detail["type"] not in _WRONG_KIND] or details


def _value(document: Any, steps: Sequence[int | str]) -> Any:
    for step in steps:
        document = document[step]
    return document


def _key_steps(loc: Sequence[int | str]) -> tuple[int | str, ...]:
    """The location without pydantic's names of union members, and without positions inside of a list value."""
    model: type[BaseModel] | None = Recipe
    steps: list[int | str] = []
    named = False  # the step is the user's name of a table, such as 12 in per_layer.12
    for step in loc:
        if isinstance(step, int) or named:
            steps.append(step)
            named = False
            continue
        if model is None or step == "[key]":
            break
        steps.append(step)
        named = get_origin(model.model_fields[step].annotation) is dict if step in model.model_fields else False
        model = _section(model, step)
    while steps and isinstance(steps[-1], int) and steps[0] != "teachers":
        steps.pop()
    return tuple(steps)


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    return _model_in(model.model_fields[key].annotation) if key in model.model_fields else None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model in an annotation such as ``list[Model] | None``; a table of models or other values has none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is dict:
        value = get_args(annotation)[1]
        return value if isinstance(value, type) and issubclass(value, BaseModel) else None
    return next((found for inner in get_args(annotation) if (found := _model_in(inner)) is not None), None)


def _known_keys(steps: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for step in steps:
        if isinstance(step, str):
            model = _section(model, step) or model
    return sorted(model.model_fields)


def _nearest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"Did you mean '{near[0]}'?"
    elsewhere = [
        name
        for name, field in Recipe.model_fields.items()
        if key in _known_keys([name]) and _section(Recipe, name) and field
    ]
    if elsewhere:
        return f"'{key}' is a key of {' and '.join(f'[{name}]' for name in elsewhere)}."
    return f"Known keys there: {', '.join(known)}."


def _location(steps: Sequence[int | str], document: dict[str, Any]) -> str:
    """``distill.seed``; a teacher by name, if it has one: ``teachers.bert.model``."""
    shown = [str(step) for step in steps]
    if len(steps) > 1 and steps[0] == "teachers" and isinstance(steps[1], int):
        entry = document["teachers"][steps[1]]
        name = entry.get("name") if isinstance(entry, dict) else None
        shown[1] = name if isinstance(name, str) else f"{steps[1] + 1}"
    if len(steps) > 2 and steps[1] == "stages" and isinstance(steps[2], int):
        shown[2] = f"{steps[2] + 1}"  # stages have no names; people count from 1
    return ".".join(shown)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:80]


def _reason(detail: ErrorDetails) -> str:
    pattern = _EXPECTED.get(detail["type"])
    if pattern is None:
        return detail["msg"].removeprefix("Value error, ")
    return pattern.format(**detail.get("ctx", {}))


def _hint(steps: Sequence[int | str], details: Sequence[ErrorDetails]) -> str:
    given = details[0]["input"]
    if steps == ("teachers",) and isinstance(given, dict):
        return "Write [[teachers]], in double brackets, over each teacher."
    for detail in details:
        if detail["type"] == "literal_error" and isinstance(given, str):
            choices = [choice.strip("'") for choice in detail["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            near = difflib.get_close_matches(given, choices, n=1, cutoff=0.5)
            return f"Did you mean '{near[0]}'?" if near else ""
        if detail["type"] == "string_type" and isinstance(given, int | float):
            return f'Write "{given}"; on the command line: --set \'KEY="{given}"\''
    return ""
