"""Which columns of a file hold the text and the label: by their names first, then by their values.

A guess comes with its reason. Several columns that could be the label are all returned: the user decides, because a
wrong label column trains a student on the wrong task.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.errors import DataError
from kdcache.progress import listed

if TYPE_CHECKING:
    from kdcache.data.reading import Rows

_LABELS = ("label", "labels", "gold_label", "class", "category", "target", "label_text", "label_name", "class_name")
_LIKELY_LABELS = (  # taken only if their values look like classes
    "sentiment", "polarity", "intent", "topic", "emotion", "stance", "tag", "y", "gold", "rating", "stars", "score",
    "coarse_label", "fine_label", "annotation", "answer", "output", "type", "spam", "is_spam", "toxic",
)  # fmt: skip
_PAIRS = (
    ("premise", "hypothesis"), ("question", "sentence"), ("question", "passage"), ("question", "context"),
    ("question", "answer"), ("query", "passage"), ("query", "document"), ("query", "text"), ("claim", "evidence"),
    ("context", "response"), ("source", "target"),
)  # fmt: skip
_TEXTS = (
    "text", "sentence", "review", "content", "body", "comment", "message", "tweet", "document", "utterance", "passage",
    "abstract", "description", "article", "post", "title", "headline", "question", "query", "snippet", "phrase",
    "input",
)  # fmt: skip
_NUMBERED = re.compile(r"(.*?)[ _.-]?([1a])", re.DOTALL)
_LOOKED_AT = 20_000  # rows, evenly spaced, so that a file sorted by label shows all of its classes
_LONGEST_CLASS = 64  # characters
_MOST_CLASSES = 1_000


@dataclass(frozen=True)
class Guess:
    """Columns and why they were taken."""

    columns: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Column:
    """What is seen of a column. ``characters``: mean length of its values."""

    name: str
    filled: int
    distinct: int
    characters: float
    text: bool  # every value is a string
    short: bool  # every value is a word, a number or a truth value that can name a class

    @property
    def classes(self) -> bool:
        """Whether the values can be classes: few, and each of them several times."""
        most = min(_MOST_CLASSES, max(2, self.filled // 3), self.filled - 1)
        return self.short and 2 <= self.distinct <= most


def seen(rows: Rows) -> dict[str, Column]:
    """The columns of a file by name."""
    return {name: _column(name, values) for name, values in rows.columns.items()}


def _column(name: str, values: Sequence[Any]) -> Column:
    looked_at = values[:: max(1, len(values) // _LOOKED_AT)]
    filled = [value for value in looked_at if value is not None and value != "" and value == value]
    if not filled:
        return Column(name, 0, 0, 0.0, text=False, short=False)
    names = [str(value) for value in filled]
    return Column(
        name,
        len(filled),
        len(set(names)),
        sum(map(len, names)) / len(names),
        text=all(isinstance(value, str) for value in filled),
        short=all(_can_name_a_class(value) for value in filled),
    )


def _can_name_a_class(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_CLASS and not _is_fraction(value)
    return isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer())


def _is_fraction(value: str) -> bool:
    try:
        return not float(value).is_integer()
    except (ValueError, OverflowError):
        return False


def label_guesses(rows: Rows, text: Sequence[str] = ()) -> tuple[Guess, ...]:
    """The columns that may hold the label, none of them in ``text``: none, one, or several that are alike."""
    columns = {name: column for name, column in seen(rows).items() if name and name not in text and column.filled}
    by_name = {name.strip().lower(): column for name, column in reversed(columns.items())}
    for name in _LABELS:
        if name in by_name and _named_label(name, by_name[name]):
            return (_by_name(by_name[name]),)
    for name in _LIKELY_LABELS:
        if name in by_name and by_name[name].classes:
            return (_by_name(by_name[name]),)
    alike = [column for column in columns.values() if column.classes]
    if len(alike) == 1:
        why = f"the only column with few different values ({_values(alike[0])})"
        return (Guess((alike[0].name,), why),)
    return tuple(Guess((column.name,), f"few different values ({_values(column)})") for column in alike)


def _named_label(name: str, column: Column) -> bool:
    """Whether a column of such a name is taken; scores and lists are, so that they are refused with the reason."""
    if name in ("label", "labels") or not column.text:
        return column.characters <= _LONGEST_CLASS
    return column.short and column.distinct <= max(20, 0.9 * column.filled)


def _by_name(column: Column) -> Guess:
    return Guess((column.name,), f"its name ({_values(column)})")


def _values(column: Column) -> str:
    return f"{column.distinct:,} in {column.filled:,} rows"


def text_guess(rows: Rows, label: str | None = None) -> Guess:
    """The column of the text, or the two columns of a pair; ``label`` is not one of them. Raises DataError."""
    columns = {name: column for name, column in seen(rows).items() if name and name != label and column.text}
    by_name = {name.strip().lower(): column for name, column in reversed(columns.items())}
    pair = _pair(by_name)
    if pair is not None:
        return Guess(pair, "their names, which are those of a pair")
    for name in _TEXTS:
        if name in by_name and not (by_name[name].classes and len(columns) > 1):
            return Guess((by_name[name].name,), f"its name ({by_name[name].characters:.0f} characters a row)")
    candidates = [column for column in columns.values() if not column.classes]
    if not candidates:
        raise DataError(
            f"no column of {rows.source} looks like a text; it has: {listed(rows.columns, quoted=True)}",
            "Name the column with --text, or two of them for pairs.",
        )
    longest = max(candidates, key=lambda column: column.characters)
    return Guess((longest.name,), f"its texts are the longest ({longest.characters:.0f} characters a row)")


def _pair(by_name: dict[str, Column]) -> tuple[str, str] | None:
    for first, second in _PAIRS:
        if first in by_name and second in by_name and not (by_name[first].classes or by_name[second].classes):
            return by_name[first].name, by_name[second].name
    for name, column in by_name.items():
        match = _NUMBERED.fullmatch(name)
        if match is None:
            continue
        other = by_name.get(name[:-1] + {"1": "2", "a": "b"}[match[2]])
        if other is not None and not (column.classes or other.classes):
            return column.name, other.name
    return None
