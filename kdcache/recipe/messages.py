"""What pydantic found wrong with a recipe, in the words of the recipe: the key, its value, what was expected, the nearest key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import pydantic
from pydantic import BaseModel

from kdcache.errors import RecipeError
from kdcache.recipe.sections import Recipe

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_EXAMPLE = "kdcache pipelines cp quickstart gives a full example."
_EXPECTED = {  # by pydantic's kind of error; what is not here keeps pydantic's own words
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
    """The first problem as a RecipeError; the number of the others is told."""
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
    """Of a union's members, those that the value was meant for: where one fails by its content, the others' kinds say nothing."""
    return [detail for detail in details if detail["type"] not in _WRONG_KIND] or details


def _value(document: Any, steps: Sequence[int | str]) -> Any:
    for step in steps:
        document = document[step]
    return document


def _key_steps(loc: Sequence[int | str]) -> tuple[int | str, ...]:
    """The location without pydantic's names for the members of a union, and without the places inside of a list value."""
    model: type[BaseModel] | None = Recipe
    steps: list[int | str] = []
    named = False  # the step is the user's own name for a table, such as the 12 of per_layer.12
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
    annotation = model.model_fields[key].annotation if key in model.model_fields else None
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


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
        name for name, field in Recipe.model_fields.items() if key in _known_keys([name]) and _section(Recipe, name) and field
    ]
    if elsewhere:
        return f"'{key}' is a key of {' and '.join(f'[{name}]' for name in elsewhere)}."
    return f"Known keys there: {', '.join(known)}."


def _location(steps: Sequence[int | str], document: dict[str, Any]) -> str:
    """``distill.seed``; a teacher by its name where it has one: ``teachers.bert.model``."""
    shown = [str(step) for step in steps]
    if len(steps) > 1 and steps[0] == "teachers" and isinstance(steps[1], int):
        entry = document["teachers"][steps[1]]
        name = entry.get("name") if isinstance(entry, dict) else None
        shown[1] = name if isinstance(name, str) else f"{steps[1] + 1}"
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
