"""All output of commands goes through ``out``: results to stdout, everything else to stderr; as text or as JSON.

A command passes its result once as data (``document``) and once as text. In JSON mode only ``document`` prints to
stdout, otherwise only the text methods, so commands need not ask for the mode.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

# Names and texts in a cache may come from somebody else: characters that control a terminal (C0, C1, bidirectional
# marks) or cannot be encoded (half surrogates) are escaped, as in JSON.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Output:
    """``json`` is set by ``--json``; streams are looked up at each use, so tests can replace them.

    ``quiet``: nothing but errors is printed, as in all processes of a training but the first.
    """

    def __init__(self) -> None:
        self.json = False
        self.quiet = False

    def document(self, data: Any) -> None:
        """The result as data: JSON on stdout, in JSON mode only. NaN becomes null."""
        if self.json and not self.quiet:
            _print(sys.stdout, json.dumps(_finite(data), indent=2, ensure_ascii=False))

    def text(self, line: str = "") -> None:
        """A line of the result."""
        if not self.json and not self.quiet:
            _print(sys.stdout, line)

    def dict(self, values: Mapping[str, Any]) -> None:
        """One aligned ``key  value`` line per entry; nested tables are indented under their key."""
        if not self.json and not self.quiet:
            for line in _lines(values):
                _print(sys.stdout, line)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Columns aligned, numbers to the right. In a terminal, a table that is too wide gets a narrower header."""
        if not self.json and not self.quiet:
            room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            for line in table_lines(columns, rows, room):
                _print(sys.stdout, line)

    def note(self, line: str) -> None:
        """A remark that is not part of the result."""
        if not self.quiet:
            _print(sys.stderr, line)

    def hint(self, line: str) -> None:
        """What to do next."""
        if line and not self.quiet:
            _print(sys.stderr, f"hint: {line}")

    def error(self, message: str, hint: str = "") -> None:
        """A line with the error and a line with the cure."""
        if self.json:
            _print(sys.stderr, json.dumps({"error": message, "hint": hint}, ensure_ascii=False))
            return
        _print(sys.stderr, "error: " + " ".join(message.split("\n")))
        if hint:
            _print(sys.stderr, f"hint: {hint}")


out = Output()


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[Any]], room: int | None = None) -> list[str]:
    """An aligned plain-text table.

    One wider than ``room`` characters gets a line per word of its header, then breaks the texts of its first column.
    """
    head = [[str(column) for column in columns]]
    body = [[_cell(value) for value in row] for row in rows]
    if room is not None and _width(head + body) > room:
        words = [column.split(" ") for column in head[0]]
        lines = max(map(len, words), default=1)
        stacked = [[""] * (lines - len(column)) + column for column in words]
        head = [[column[line] for column in stacked] for line in range(lines)]
        excess = _width(head + body) - room
        most = _widths(head + body)[0] - excess
        body = [line for row in body for line in _broken(row, most)] if excess > 0 else body
    widths = _widths(head + body)
    right = [
        all(isinstance(row[position], int | float) or row[position] is None for row in rows)
        for position in range(len(columns))
    ]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [*map(line, head), "  ".join("-" * width for width in widths), *map(line, body)]


def _broken(row: Sequence[str], most: int) -> list[list[str]]:
    """A row whose first cell has at most ``most`` characters in a line, if its words allow."""
    first = textwrap.wrap(row[0], max(1, most), break_long_words=False, break_on_hyphens=False) or [""]
    return [[first[0], *row[1:]], *([f"  {more}", *[""] * (len(row) - 1)] for more in first[1:])]


def _widths(cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*cells, strict=True)]


def _width(cells: Sequence[Sequence[str]]) -> int:
    widths = _widths(cells)
    return sum(widths) + 2 * max(0, len(widths) - 1)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _lines(values: Mapping[str, Any], indent: str = "") -> list[str]:
    width = max((len(str(key)) for key, value in values.items() if not isinstance(value, Mapping)), default=0)
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        else:
            shown = ", ".join(str(item) for item in value) if isinstance(value, list | tuple) else _cell(value)
            lines.append(f"{indent}{str(key).ljust(width)}  {shown}".rstrip())
    return lines


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _print(stream: TextIO, line: str) -> None:
    stream.write(_UNPRINTABLE.sub(_escaped, line) + "\n")
    stream.flush()
