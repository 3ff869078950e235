"""Data files and hub data sets to columns of strings and numbers, with the line of every row.

The readers are strict, because a row that is silently dropped, shifted or truncated is a wrong label in every student.
A wrong number of fields, a bad byte or a NUL is an error with file and line. TSV has no quoting, as in GLUE; CSV has
the quoting of spreadsheets; JSON lines have one object per line; pyarrow reads Parquet. Hub data sets need the extra
``kdcache[hub]``.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

from kdcache.errors import DataError, first_line
from kdcache.progress import listed

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]*(/[\w.-]+)?)?")
_LONGEST_CSV_FIELD = 2**30  # characters; the default of the csv module, 131,072, is too small for long documents


@dataclass(frozen=True)
class Rows:
    """Columns of equal length. ``lines[i]`` is the first line of row ``i`` in a text file, else the row, from 1."""

    source: str
    columns: dict[str, Sequence[Any]]
    lines: Sequence[int]
    unit: str = "line"  # or "row", for files without lines
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by integer column, from the data set

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """``file.tsv, line 7``, for messages."""
        return f"{self.source}, {self.unit} {self.lines[row]}"

    def take(self, keep: Sequence[bool]) -> Rows:
        """The rows where ``keep`` is true."""
        columns: dict[str, Sequence[Any]] = {
            name: list(compress(values, keep)) for name, values in self.columns.items()
        }
        return replace(self, columns=columns, lines=list(compress(self.lines, keep)))

    def column(self, name: str, key: str) -> Sequence[Any]:
        """A column by name; DataError names the existing ones and the recipe's ``key``."""
        if name not in self.columns:
            known = listed(self.columns, quoted=True)
            flag = f"; for kdcache evaluate: --{key}" if key in ("text", "label") else ""
            raise DataError(
                f"{self.source} has no column '{name}'; it has: {known}", f"Set data.{key} to one of these{flag}."
            )
        return self.columns[name]


def read_rows(source: str, split: str = "train") -> Rows:
    """All rows of a file, or of a hub data set ``name``, ``name:config`` or ``name:config/split``.

    ``split`` is the default of hub data sets. Raises DataError with file, line and hint.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        raise DataError(
            f"'{path.absolute()}' is a directory; a data file was expected", f"Give one of its files ({_KNOWN})."
        )
    if path.suffix.lower() in _READERS or not _HUB_NAME.fullmatch(source):
        raise DataError(
            f"there is no data file '{path.absolute()}'",
            "Paths in a recipe are relative to the recipe; check the spelling.",
        )

    return read_hub(source, split)


def _read_file(path: Path) -> Rows:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"'{path}' has the ending '{path.suffix}', which is not known; known are {_KNOWN}", "Rename or convert it."
        )
    try:
        rows = reader(path)
    except OSError as error:
        raise DataError(
            f"'{path}' cannot be read: {error.strerror or error}", "Check the file and its permissions."
        ) from error
    if not rows.columns:
        raise DataError(f"'{path}' is empty; a header and rows were expected")
    if not len(rows):
        raise DataError(f"'{path}' holds no rows, only a header")
    return rows


def _read_text(path: Path) -> str:
    """The file as UTF-8, without a byte order mark; bad bytes and NULs are errors with their line."""
    content = path.read_bytes()
    nul = content.find(0)
    if nul >= 0:
        line = content.count(b"\n", 0, nul) + 1
        raise DataError(
            f"{path}, line {line} holds a NUL byte; text was expected",
            "Is it UTF-16, or a binary file? Save it as UTF-8.",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        bad = content[error.start]
        raise DataError(f"{path}, line {line} is not UTF-8: byte 0x{bad:02x}", "Save the file as UTF-8.") from error


def _read_tsv(path: Path) -> Rows:
    lines = [line.removesuffix("\r") for line in _read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        return Rows(str(path), {}, [])
    header = _checked_header(path, lines[0].split("\t"))
    table = [line.split("\t") for line in lines[1:]]
    numbers = range(2, len(lines) + 1)
    for number, values in zip(numbers, table, strict=True):
        _check_width(path, number, values, header, "tabs")
    return Rows(str(path), _transposed(header, table), numbers)


def _read_csv(path: Path) -> Rows:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    limit = csv.field_size_limit(_LONGEST_CSV_FIELD)
    table, numbers, line = [], [], 1
    try:
        for values in reader:
            if values:  # blank lines are skipped
                table.append(values)
                numbers.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line} is not CSV: {error}",
            "Double the quotation marks inside of a quoted field, or save it as TSV.",
        ) from error
    finally:
        csv.field_size_limit(limit)
    if not table:
        return Rows(str(path), {}, [])
    header = _checked_header(path, table.pop(0))
    for number, values in zip(numbers[1:], table, strict=True):
        _check_width(path, number, values, header, "commas")
    return Rows(str(path), _transposed(header, table), numbers[1:])


def _read_jsonl(path: Path) -> Rows:
    records: list[dict[str, Any]] = []
    numbers = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number} is not JSON: {error}", "Each line holds one JSON object."
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path}, line {number} is not a JSON object but: {line[:60]}", 'Write {"text": …, "label": …}.'
            )
        records.append(record)
        numbers.append(number)
    names = dict.fromkeys(name for record in records for name in record)
    return Rows(str(path), {name: [record.get(name) for record in records] for name in names}, numbers)


def _read_parquet(path: Path) -> Rows:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read()
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"'{path}' is not readable Parquet: {first_line(error)}", "Write or copy it again.") from error
    columns = {name: table.column(index).to_pylist() for index, name in enumerate(table.column_names)}
    return Rows(str(path), columns, range(1, table.num_rows + 1), unit="row")


def _checked_header(path: Path, header: list[str]) -> list[str]:
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{path}, line 1 names the column '{name}' twice", "Columns need names of their own.")
    return header


def _check_width(path: Path, line: int, values: list[str], header: list[str], separators: str) -> None:
    if len(values) != len(header):
        raise DataError(
            f"{path}, line {line} has {len(values)} fields; the header has {len(header)}: {listed(header)}",
            f"Look for {separators} inside of the text, or for a broken line.",
        )


def _transposed(header: list[str], table: list[list[str]]) -> dict[str, Sequence[Any]]:
    columns = list(zip(*table, strict=True)) if table else [()] * len(header)
    return dict(zip(header, columns, strict=True))


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}
_KNOWN = ", ".join(_READERS)


def parse_spec(spec: str, split: str) -> tuple[str, str | None, str]:
    """``name``, ``name:config``, ``name:config/split`` or ``name:/split`` as (name, config, split)."""
    name, _, rest = spec.partition(":")
    config, _, named_split = rest.partition("/")
    return name, config or None, named_split or split


def read_hub(spec: str, split: str) -> Rows:
    """One split of a hub data set; DataError if the extra is missing, the hub unreachable or the name unknown."""
    name, config, split = parse_spec(spec, split)
    no_file = f"there is no data file '{Path(spec).absolute()}'"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{no_file}, and data sets by hub name ('{spec}') need the package 'datasets'",
            "Give the path of a file, or install the extra: pip install 'kdcache[hub]'",
        ) from error
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # datasets and huggingface_hub raise many unrelated classes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{no_file}, and the hub data set '{name}' (config {config or 'default'}, split '{split}') "
            f"could not be loaded: {reason}",
            "Check the name as NAME:CONFIG/SPLIT and the connection, or give the path of a file.",
        ) from error
    return rows_of(table, spec)


def rows_of(table: Any, source: str) -> Rows:
    """A ``datasets.Dataset`` as rows. ``ClassLabel`` columns become class names; -1 means no label there."""
    columns: dict[str, Sequence[Any]] = {name: list(table[name]) for name in table.column_names}
    class_names = {}
    for name, feature in table.features.items():
        names = getattr(feature, "names", None)
        if names is not None:
            class_names[name] = tuple(names)
            columns[name] = [None if value is None or value < 0 else names[value] for value in columns[name]]
    return Rows(source, columns, range(1, len(table) + 1), unit="row", class_names=class_names)
