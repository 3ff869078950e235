"""All that commands print goes through ``out``: results on stdout, everything else on stderr; for humans or as JSON.

In JSON mode ``document`` is the one thing on stdout and the human forms say nothing, so a command states its result
once as data and once as text, and never asks which of the two is wanted.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

# Names and texts in a cache may come from somebody else: what steers a terminal (C0, C1, changes of direction), or
# cannot be printed (half surrogates), is spelled out. The spelling is also JSON's.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Output:
    """``json`` is switched on by ``--json``; streams are looked up when used, so that tests and pipes see them."""

    def __init__(self) -> None:
        self.json = False

    def document(self, data: Any) -> None:
        """The result as data: JSON on stdout, in JSON mode only. NaN becomes null, which JSON has."""
        if self.json:
            _say(sys.stdout, json.dumps(_finite(data), indent=2, ensure_ascii=False))

    def text(self, line: str = "") -> None:
        """A line of the result."""
        if not self.json:
            _say(sys.stdout, line)

    def dict(self, values: Mapping[str, Any]) -> None:
        """One aligned ``key  value`` line per entry; nested tables are indented under their key."""
        if not self.json:
            for line in _lines(values):
                _say(sys.stdout, line)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Columns aligned, numbers to the right."""
        if not self.json:
            for line in table_lines(columns, rows):
                _say(sys.stdout, line)

    def note(self, line: str) -> None:
        """Something worth knowing that is not the result."""
        _say(sys.stderr, line)

    def hint(self, line: str) -> None:
        """What to do next."""
        if line:
            _say(sys.stderr, f"hint: {line}")

    def error(self, message: str, hint: str = "") -> None:
        """One line that says what is wrong and one that says what cures it."""
        if self.json:
            _say(sys.stderr, json.dumps({"error": message, "hint": hint}, ensure_ascii=False))
            return
        _say(sys.stderr, "error: " + " ".join(message.split("\n")))
        self.hint(hint)


out = Output()


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A plain table that survives pipes and narrow logs."""
    cells = [[str(column) for column in columns], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[position]) for row in cells) for position in range(len(columns))]
    right = [
        all(isinstance(row[position], int | float) or row[position] is None for row in rows)
        for position in range(len(columns))
    ]
    lines = []
    for row in cells:
        padded = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


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


def _spelled(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _say(stream: TextIO, line: str) -> None:
    stream.write(_UNPRINTABLE.sub(_spelled, line) + "\n")
    stream.flush()
