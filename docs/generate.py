"""Reference pages that are made from the code when the site is built: commands, recipe keys, errors, Python.

``conf.py`` writes them into ``docs/reference/``; nothing of them is in the repository, so none can be out of date. The
text of a recipe key is the comment beside it in ``kdcache/recipe`` (docs/decisions/0037).
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import kdcache
from kdcache import errors
from kdcache.cache.reader import Cache
from kdcache.cli.guard import EXIT_CODES
from kdcache.cli.main import app
from kdcache.cli.methods import as_markdown
from kdcache.recipe import sections, storage, sweep, training


class Table(NamedTuple):
    """A table of a recipe, as a section of the page."""

    header: str  # as in TOML
    model: type[BaseModel]
    about: str = ""  # instead of the docstring of the class
    without: type[BaseModel] | None = None  # its keys are in a section of their own, unless the default differs
    as_in: tuple[type[BaseModel], ...] = ()  # classes with the same keys, whose comments hold here too


BOTH = "Keys of both trainings"
TABLES = (
    Table("", sections.Recipe, about="Keys above the first section."),
    Table("[data]", sections.DataSection),
    Table("[[teachers]]", sections.TeacherSection),
    Table(BOTH, training.OptimSection, about="`[cofinetune]` and `[distill]` have these keys and their own."),
    Table("[cofinetune]", training.CofinetuneSection, without=training.OptimSection),
    Table("[dump]", storage.DumpSection),
    Table("[dump.per_layer.LAYER]", storage.StoredSection),
    Table("[student]", training.StudentSection),
    Table("[distill]", training.DistillSection, without=training.OptimSection),
    Table("[distill.weights]", training.WeightsSection),
    Table("[[distill.stages]]", training.StageSection, as_in=(training.OptimSection, training.DistillSection)),
    Table("[distill.stages.weights]", training.StageWeights, as_in=(training.WeightsSection,)),
    Table("[baseline]", training.BaselineSection, as_in=(training.OptimSection,)),
    Table("[sweep]", sweep.SweepSection),
    Table("[sweep.search]", sweep.SearchSection),
    Table("[sweep.search.space]", sweep.RangeSection),
)


def write_pages(docs: Path) -> None:
    """Write all generated pages; a page that is as it was keeps its time, so that nothing is built again."""
    pages = {
        "methods-list.md": as_markdown(),
        "reference/commands.md": commands_page(),
        "reference/recipe.md": recipe_page(),
        "reference/errors.md": errors_page(),
        "reference/python.md": python_page(),
    }
    for name, text in pages.items():
        page = docs / name
        page.parent.mkdir(exist_ok=True)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def commands_page() -> str:
    """Every command with its arguments and options, as ``--help`` shows them."""
    lines = [
        "# Commands",
        "",
        "Results go to stdout, everything else to stderr. `--json` prints a result as one JSON document. "
        "[Exit codes](errors.md) say how a command ended.",
    ]
    for name, command in all_commands():
        lines += ["", f"## {name}", "", *_command_text(name, command)]
    return "\n".join(lines) + "\n"


def all_commands() -> list[tuple[str, Any]]:
    """(name, command) of every command, such as ``kdcache cache push``; ``kdcache`` itself comes first."""
    return list(_walk("kdcache", typer.main.get_command(app)))


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", {})
    if not inner or name == "kdcache":
        yield name, command
    for part, child in inner.items():
        yield from _walk(f"{name} {part}", child)


def _command_text(name: str, command: Any) -> Iterator[str]:
    context = typer.Context(command, info_name=name)
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    examples = [part.removeprefix("Example: ") for part in paragraphs if part.startswith("Example: ")]
    for paragraph in paragraphs:
        if not paragraph.startswith("Example: "):
            yield _prose(paragraph)
            yield ""
    yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```"
    records = [parameter.get_help_record(context) for parameter in command.params if not parameter.hidden]
    shown = [record for record in records if record is not None]
    if shown:
        yield ""
        yield "| argument or option | meaning |"
        yield "|---|---|"
        for flags, meaning in shown:
            yield f"| `{_cell(flags)}` | {_prose(_cell(meaning))} |"
    if examples:
        yield ""
        yield "```sh"
        yield from (" ".join(example.split()) for example in examples)
        yield "```"


def recipe_page() -> str:
    """Every key of a recipe with its type, its default and the comment beside it in the code."""
    lines = [
        "# Recipe keys",
        "",
        "A recipe is a TOML file. Paths are relative to it. An unknown key is an error that names the nearest known "
        "one. `--set section.key=value` overrides a key on the command line.",
    ]
    for table in TABLES:
        title = f"`{table.header}`" if table.header.startswith("[") else table.header or "Top of the file"
        about = table.about or _prose(inspect.cleandoc(table.model.__doc__ or "").replace("\n\n", "\n"))
        lines += ["", f"## {title}", "", about, "", "| key | value | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{key}` | {kind} | {default} | {meaning} |" for key, kind, default, meaning in keys_of(table)]
    return "\n".join(lines) + "\n"


def keys_of(table: Table) -> list[tuple[str, str, str, str]]:
    """(key, value, default, meaning) of the keys that the section of a table lists."""
    comments = {key: text for model in (*table.as_in, table.model) for key, text in key_comments(model).items() if text}
    schema = table.model.model_json_schema()
    inherited = {} if table.without is None else table.without.model_fields
    rows = []
    for key, field in table.model.model_fields.items():
        if key in inherited and field.default == inherited[key].default:
            continue
        default = field.get_default(call_default_factory=True)
        kind = _kind(schema["properties"][key], schema.get("$defs", {}))
        rows.append((key, _cell(kind), _default(default), _prose(_cell(comments.get(key, "")))))
    return rows


def key_comments(model: type[BaseModel]) -> dict[str, str]:
    """The comments beside the keys in the source of a class: in the lines of a key, or else just above it."""
    source = textwrap.dedent(inspect.getsource(model))
    beside: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = re.sub(r"^#\s*|\s*noqa:.*$", "", token.string).strip()
            (alone if token.line.strip().startswith("#") else beside)[token.start[0]] = text
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    comments = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found = [beside[line] for line in lines if line in beside]
            above = node.lineno - 1
            while not beside.keys() & set(lines) and above in alone:
                found.insert(0, alone[above])
                above -= 1
            comments[node.target.id] = " ".join(found)
    return comments


def _kind(schema: dict[str, Any], named: dict[str, Any]) -> str:
    """What a value may be, from its JSON schema."""
    if "$ref" in schema:
        return _kind(named[schema["$ref"].rpartition("/")[2]], named)
    if "allOf" in schema:
        return _kind(schema["allOf"][0], named)
    if "anyOf" in schema:
        kinds = dict.fromkeys(_kind(choice, named) for choice in schema["anyOf"] if choice.get("type") != "null")
        return " or ".join(kind for kind in kinds if kind != "whole number" or "number" not in kinds)
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if schema.get("type") == "array":
        inner = _kind(schema.get("items", {}), named)
        return "list of " + re.sub("^(whole number|number|text|table|value)", r"\1s", inner)
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    return names.get(schema.get("type", ""), "table" if schema.get("type") == "object" else "value") + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    said = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in said.items() if key in schema and schema[key] != 2**32]
    return f" {', '.join(bounds)}" if bounds else ""


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or isinstance(value, BaseModel) or value == {}:
        return ""
    return f"`{json.dumps(value)}`"


def errors_page() -> str:
    """The exit codes, and the classes of ``kdcache.errors``."""
    lines = [
        "# Errors and exit codes",
        "",
        "An error is one line that says what is wrong, and one that says how to fix it.",
    ]
    lines += ["", "| exit code | meaning |", "|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    lines += [
        "",
        "From Python, the same errors are exceptions of `kdcache.errors` with `message`, `hint` and `exit_code`. "
        "`KDCACHE_DEBUG=1` shows the traceback of a command.",
        "",
        "| class | is a | exit code | when |",
        "|---|---|---|---|",
    ]
    for error in error_classes():
        parents = ", ".join(f"`{parent.__name__}`" for parent in error.__bases__)
        about = _prose(_cell(inspect.cleandoc(error.__doc__ or "")))
        lines.append(f"| `{error.__name__}` | {parents} | {error.exit_code} | {about} |")
    return "\n".join(lines) + "\n"


def error_classes() -> list[type[errors.KdcacheError]]:
    """In the order of the module: each after its parent."""
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    return [value for value in found if issubclass(value, errors.KdcacheError)]


_PYTHON = """\
# Python API

`import kdcache` gives everything here; torch is imported on first use. [From Python](../python.md) shows how the parts
go together, and [Errors](errors.md) lists the exceptions.
"""
_PLACES = {"kdcache.distill": "kdcache.api.distill"}  # a package that is callable (docs/decisions/0033)


def python_page() -> str:
    """What ``kdcache`` exports; Sphinx fills in the docstrings."""
    lines = [_PYTHON.rstrip()]
    for title, values in python_values().items():
        lines += ["", f"## {title}", "", "```{eval-rst}"]
        for name, value in values.items():
            kind = "class" if isinstance(value, type) else "function"
            lines += [f".. auto{kind}:: {_PLACES.get(name, name)}", *(["   :members:"] if kind == "class" else [])]
        lines += ["```"]
    return "\n".join(lines) + "\n"


def python_values() -> dict[str, dict[str, Any]]:
    """Heading -> name -> value: all that kdcache and kdcache.losses export, and the class of an open cache."""
    exported = {f"kdcache.{name}": getattr(kdcache, name) for name in kdcache.__all__ if name != "__version__"}
    losses = exported.pop("kdcache.losses")
    caches = {f"kdcache.{name}": exported.pop(f"kdcache.{name}") for name in ("load_recipe", "open_cache", "loader")}
    values = {"kdcache.Run": exported.pop("kdcache.Run"), f"{Cache.__module__}.Cache": Cache}
    of_losses = {f"kdcache.losses.{name}": getattr(losses, name) for name in losses.__all__}
    return {
        "Stages": exported,
        "Recipes, caches and batches": caches,
        "Runs and caches as values": values,
        "Losses": {name: value for name, value in of_losses.items() if _is_ours(value)},
    }


def _is_ours(value: Any) -> bool:
    """False for names of types, such as a ``Literal``."""
    return str(getattr(value, "__module__", "")).startswith("kdcache")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _prose(text: str) -> str:
    """Plain text of the code as Markdown: double backticks become single ones, and options become code."""
    parts = re.split(r"(``.+?``|`[^`]+`|(?<!\S)--[a-z][a-z-]*)", " ".join(text.split()) if "\n" in text else text)
    return "".join(
        f"`{part.strip('`')}`" if part.startswith(("`", "--")) else part.replace("*", "\\*").replace("<", "&lt;")
        for part in parts
    )
