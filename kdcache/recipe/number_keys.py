"""Which numbers a recipe key takes, from the types of the recipe's sections."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from kdcache.recipe.sections import Recipe


def is_known_key(key: str) -> bool:
    """Whether a recipe may have the dotted ``key``, as in ``--set``, whatever its value."""
    return bool(_types_of(key))


def number_type(key: str) -> type[int] | type[float] | None:
    """``int`` for a dotted key of whole numbers, ``float`` for one of real numbers.

    None where the type of the key does not say it: for keys without numbers, and within ``student.config``.
    """
    found = {each for each in _types_of(key) if each in (int, float)}
    return found.pop() if len(found) == 1 else None


def _types_of(key: str) -> list[Any]:
    """The types that a value of ``key`` may have; empty for an unknown key."""
    found: list[Any] = [Recipe]
    for step in key.split("."):
        found = [inner for each in found for inner in _inside(each, step.strip())]
    return found


def _inside(annotation: Any, step: str) -> Iterator[Any]:
    """The types of what ``step`` names in a value: a key of a section or table, or the number of a list's entry."""
    if annotation is Any:
        yield Any
    elif get_origin(annotation) in (dict, Mapping):
        yield from _members(get_args(annotation)[1])
    elif get_origin(annotation) is list:
        yield from _members(get_args(annotation)[0])
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel) and step in annotation.model_fields:
        yield from _members(annotation.model_fields[step].annotation)


def _members(annotation: Any) -> Iterator[Any]:
    """The types of a union, each without its bounds; any other type alone."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for each in get_args(annotation):
            yield from _members(each)
    else:
        yield annotation
