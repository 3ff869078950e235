"""One self-contained HTML file: text, tables and charts as plain data, rendered with a template that escapes them.

The file carries the script that draws its charts (Vega-Lite), and a policy by which a browser loads nothing and runs no
other script. Names of labels and texts may come from anybody: they pass through the template's escaping, or as JSON
without ``<``.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from kdcache.report.charts import Spec

Cell = Mapping[str, str] | str | int | float | None


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    muted: bool = False


@dataclass(frozen=True)
class Code:
    """Text as it is in a file."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Table:
    """Columns to the right, but those in ``left``.

    ``strong``: rows in bold; ``wide``: long texts in the first column.
    """

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: frozenset[int] = frozenset((0,))
    strong: frozenset[int] = frozenset()
    wide: bool = False


@dataclass(frozen=True)
class Figure:
    """A chart with its title."""

    kind: ClassVar[str] = "figure"
    title: str
    spec: Spec
    note: str = ""

    @property
    def widths(self) -> str:
        """CSS: the least width, below which the page scrolls the chart, and the greatest; empty for any width."""
        found = self.spec["usermeta"]
        return f"min-width: {found['least']}px; max-width: {found['most']}px" if "least" in found else ""

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Names and their CSS colours; empty for fewer than two."""
        found: list[tuple[str, str]] = self.spec["usermeta"]["legend"]
        return found if len(found) > 1 else []


@dataclass(frozen=True)
class Side:
    """Blocks beside each other where there is room."""

    kind: ClassVar[str] = "side"
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away under a title."""

    kind: ClassVar[str] = "details"
    title: str
    blocks: Sequence[Block]


Block = Text | Code | Table | Figure | Side | Details


@dataclass(frozen=True)
class Section:
    """A question, and the blocks that answer it. ``id``: its place in the page."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Caution:
    """A warning at the top of the page, and what to do about it."""

    text: str
    hint: str = ""


@dataclass(frozen=True)
class Page:
    """The contents of a page."""

    title: str
    sections: Sequence[Section]
    warnings: Sequence[Caution] = ()
    subtitle: str = ""
    lead: str = ""


def noted(text: str, note: str) -> dict[str, str]:
    """A cell with a remark under it."""
    return {"text": text, "note": note}


def percent(value: float | None) -> str:
    """0.8437 -> ``84.4%``; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}%"


def render(page: Page) -> str:
    """The HTML document."""
    import jinja2

    figures = [figure for section in page.sections for figure in _figures(section.blocks)]
    numbers = {id(figure): number for number, figure in enumerate(figures)}
    library, draw = charting_script(), _part("draw.js")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(_part("page.html")).render(
        page=page,
        number=lambda figure: numbers[id(figure)],
        style=_part("style.css"),
        charts=script_json([figure.spec for figure in figures]),
        library=library,
        draw=draw,
        hashes=" ".join(f"'sha256-{_digest(script)}'" for script in (library, draw)),
    )


def script_json(value: Any) -> str:
    """JSON for a script element: without ``<``, which could end it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@functools.cache
def charting_script() -> str:
    """The script of Vega, Vega-Lite and vega-embed, 0.9 MB."""
    import vl_convert

    script = str(vl_convert.javascript_bundle(None))  # type: ignore[arg-type]  # None: the whole; its stub omits it
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _figures(blocks: Sequence[Block]) -> Iterator[Figure]:
    for block in blocks:
        if isinstance(block, Figure):
            yield block
        elif isinstance(block, Side | Details):
            yield from _figures(block.blocks)


def _part(name: str) -> str:
    """A file of the template."""
    return (files("kdcache.report") / "template" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
