"""How a cache shows itself: one line for a terminal, two small tables for a notebook; from the manifest alone."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kdcache.cache.card import describe
from kdcache.codecs.registry import format_of
from kdcache.progress import counted, format_bytes, listed

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.cache.spec import TeacherSpec


def as_line(cache: Cache) -> str:
    """``Cache('runs/sst2/cache': 2 teachers: bert, roberta; 184 texts; train 96, test 32; identity 8ad0f1c2…)``."""
    teachers, contents = cache.teachers, cache.manifest.contents
    splits = ", ".join(f"{name} {split.examples:,}" for name, split in contents.splits.items())
    texts = counted(sum(part.texts for part in cache.parts), "text")
    named = f"{counted(len(teachers), 'teacher')}: {listed(teachers)}"
    return f"Cache('{cache.path}': {named}; {texts}; {splits}; identity {cache.identity[:12]})"


def as_html(cache: Cache) -> str:
    """The teachers and the splits of a cache; every name is escaped."""
    facts = describe(cache)
    rows = [
        (name, spec.width, _layers(spec), format_bytes(facts["teachers"][name]["bytes"]))
        for name, spec in cache.teachers.items()
    ]
    labels, columns = listed(cache.task.label_names), listed(cache.task.text_columns)
    lines = [
        f"<b>Cache</b> {html.escape(str(cache.path))}, {format_bytes(facts['bytes'])}, "
        f"identity <code>{cache.identity[:12]}</code>",
        html.escape(f"text: {columns}; labels: {labels}; texts stored: {'yes' if cache.has_text else 'no'}"),
    ]
    splits = [(name, f"{examples:,}") for name, examples in facts["examples"].items()]
    tables = html_rows(("teacher", "width", "layers", "size"), rows) + html_rows(("split", "examples"), splits)
    return "<div>" + "".join(f"<p>{line}</p>" for line in lines) + tables + "</div>"


def html_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain HTML table, for notebooks, which have styles of their own; every cell is escaped."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape('' if cell is None else str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _layers(spec: TeacherSpec) -> str:
    """``2, 4: 8 of 16 dimensions, int8``; layers that are stored alike share a line."""
    alike: dict[str, list[int]] = {}
    for number, layer in spec.layers.items():
        alike.setdefault(f"{layer.dim} dimensions, {format_of(layer).name}", []).append(number)
    return "; ".join(f"{', '.join(map(str, numbers))}: {stored}" for stored, numbers in alike.items()) or "logits only"
