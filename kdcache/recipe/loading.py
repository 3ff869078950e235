"""Recipe files and ``--set`` overrides to a checked ``Recipe`` with absolute paths, and back to TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from kdcache.errors import RecipeError
from kdcache.recipe.messages import explain
from kdcache.recipe.sections import DATA_FILE_ENDINGS, Recipe

S = TypeVar("S", bound=pydantic.BaseModel)


def load_recipe(path: str | Path, overrides: Sequence[str] | None = None) -> Recipe:
    """Read a TOML recipe, apply ``section.key=value`` overrides, check it, make paths absolute.

    Paths are relative to the recipe; where nothing lies there, to the working directory, for overrides typed on the spot.
    Raises RecipeError (exit 2) with the file, the key and the nearest known key.
    """
    path = Path(path)
    document = _read(path)
    for override in overrides or []:
        _apply_override(document, override)
    try:
        recipe = Recipe.model_validate(document, strict=True)
    except pydantic.ValidationError as error:
        raise explain(error, path, document) from error
    return _absolute_paths(recipe, path.resolve().parent)


def dump_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML text, which ``load_recipe`` reads back to an equal recipe."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RecipeError(
            f"there is no recipe '{path.absolute()}'", "See the ones that come with kdcache: kdcache pipelines ls"
        ) from error
    except IsADirectoryError as error:
        raise RecipeError(f"'{path}' is a directory; a recipe file was expected", "Name the .toml file in it.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe '{path}' is not UTF-8: {error.reason} at byte {error.start}", "Save it as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe '{path}' is not TOML: {error}", "Strings need quotation marks, sections brackets.") from error
    except OSError as error:
        raise RecipeError(f"recipe '{path}' cannot be read: {error.strerror}", "Check the file and its permissions.") from error


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = [step.strip() for step in key.split(".")]
    if not equals or not last or not all(sections):
        raise RecipeError(f"override '{override}' is not of the form section.key=value", "Example: --set distill.seed=1")
    table = document
    while sections:
        section = sections.pop(0)
        if section == "teachers" and table is document:
            table = _teacher(document.get("teachers"), sections, override)
            continue
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"override '{override}': '{section}' is a value, not a section", "Set the value itself.")
    table[last] = _override_value(text)


def _override_value(text: str) -> Any:
    """TOML where it is TOML; else a bare word, which is a string."""
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return read["value"] if len(read) == 1 else text


def _teacher(tables: Any, steps: list[str], override: str) -> dict[str, Any]:
    """The teacher that the next steps name; they are taken from ``steps``, several where its name holds dots."""
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
        f"override '{override}': there is no teacher '{'.'.join(steps)}'; there are: {known}", "Teachers are added in the recipe."
    )


def _absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    """Values that name a file or directory become absolute; the rest are hub names and stay as they are."""

    def resolved(value: str) -> str:
        path = Path(value).expanduser()
        for root in (base, Path.cwd()):
            if (root / path).exists():
                return str((root / path).resolve())
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
