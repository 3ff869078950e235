"""Data files and hub data sets to columns of strings and numbers, with the line of every row.

The readers are strict, because a row that is silently dropped, shifted or truncated is a wrong label in every student.
A wrong number of fields, a bad byte or a NUL is an error with file and line. TSV has no quoting, as in GLUE; CSV has
the quoting of spreadsheets; JSON lines have one object per line; pyarrow reads Parquet. Hub data sets need the extra
``kdcache[hub]``.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

from kdcache.errors import DataError, first_line
from kdcache.progress import listed

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]*(/[\w.-]+)?)?")
_BATCH = 1 << 16  # rows that are read together
_BLOCK = 1 << 24  # bytes
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


def read_batches(path: Path) -> Iterator[Rows]:
    """The rows of a file, at most ``_BATCH`` at a time. Columns of JSON lines are those that a batch has.

    Raises DataError as ``read_rows``, also for a file without rows.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"'{path}' has the ending '{path.suffix}', which is not known; known are {_KNOWN}", "Rename or convert it."
        )
    columns = rows = 0
    try:
        for batch in reader(path):
            columns, rows = columns + len(batch.columns), rows + len(batch)
            if len(batch):
                yield batch
    except OSError as error:
        raise DataError(
            f"'{path}' cannot be read: {error.strerror or error}", "Check the file and its permissions."
        ) from error
    if not columns:
        raise DataError(f"'{path}' is empty; a header and rows were expected")
    if not rows:
        raise DataError(f"'{path}' holds no rows, only a header")


def _read_file(path: Path) -> Rows:
    batches = list(read_batches(path))
    if len(batches) == 1:
        return batches[0]
    names = dict.fromkeys(name for batch in batches for name in batch.columns)
    columns: dict[str, Sequence[Any]] = {
        name: [value for batch in batches for value in batch.columns.get(name, [None] * len(batch))] for name in names
    }
    return replace(batches[0], columns=columns, lines=[line for batch in batches for line in batch.lines])


def _open_text(path: Path, newline: str) -> io.TextIOWrapper:
    """The file as UTF-8, without a byte order mark; bad bytes and NULs are errors with their line."""
    with path.open("rb") as file:
        before = 0
        while block := file.read(_BLOCK):
            if (nul := block.find(0)) >= 0:
                line = before + block.count(b"\n", 0, nul) + 1
                raise DataError(
                    f"{path}, line {line} holds a NUL byte; text was expected",
                    "Is it UTF-16, or a binary file? Save it as UTF-8.",
                )
            before += block.count(b"\n")
        file.seek(0)
        before = 1
        for block in _whole_lines(file):
            try:
                block.decode("utf-8")
            except UnicodeDecodeError as error:
                line = before + block.count(b"\n", 0, error.start)
                raise DataError(
                    f"{path}, line {line} is not UTF-8: byte 0x{block[error.start]:02x}", "Save the file as UTF-8."
                ) from error
            before += block.count(b"\n")
    return path.open(encoding="utf-8-sig", newline=newline)


def _whole_lines(file: io.BufferedReader) -> Iterator[bytes]:
    """The bytes of a file in blocks that end with a line."""
    rest = b""
    while block := file.read(_BLOCK):
        end = block.rfind(b"\n") + 1
        if end:
            yield rest + block[:end]
            rest = block[end:]
        else:
            rest += block
    yield rest


def _read_tsv(path: Path) -> Iterator[Rows]:
    with _open_text(path, "\n") as file:
        lines = _without_blank_end(line.removesuffix("\n").removesuffix("\r") for line in file)
        first = next(lines, None)
        if first is None:
            return
        header = _checked_header(path, first.split("\t"))
        yield Rows(str(path), _transposed(header, []), [])
        start = 2
        while table := [line.split("\t") for line in itertools.islice(lines, _BATCH)]:
            numbers = range(start, start + len(table))
            for number, values in zip(numbers, table, strict=True):
                _check_width(path, number, values, header, "tabs")
            yield Rows(str(path), _transposed(header, table), numbers)
            start += len(table)


def _without_blank_end(lines: Iterable[str]) -> Iterator[str]:
    """All lines but the empty ones at the end."""
    blank = 0
    for line in lines:
        if not line:
            blank += 1
            continue
        yield from itertools.repeat("", blank)
        blank = 0
        yield line


def _read_csv(path: Path) -> Iterator[Rows]:
    header: list[str] | None = None
    with _open_text(path, "") as file:
        for numbers, table in _csv_tables(path, csv.reader(file, strict=True)):
            if header is None:
                header = _checked_header(path, table.pop(0))
                yield Rows(str(path), _transposed(header, []), numbers[:0])
                del numbers[0]
            for number, values in zip(numbers, table, strict=True):
                _check_width(path, number, values, header, "commas")
            yield Rows(str(path), _transposed(header, table), numbers)


def _csv_tables(path: Path, reader: Any) -> Iterator[tuple[list[int], list[list[str]]]]:
    """The values of some rows, with their first lines."""
    line, left = 1, True
    while left:
        table: list[list[str]] = []
        numbers: list[int] = []
        limit = csv.field_size_limit(_LONGEST_CSV_FIELD)
        try:
            while left and len(table) < _BATCH:
                values = next(reader, None)
                if values:  # blank lines are skipped
                    table.append(values)
                    numbers.append(line)
                left, line = values is not None, reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}, line {line} is not CSV: {error}",
                "Double the quotation marks inside of a quoted field, or save it as TSV.",
            ) from error
        finally:
            csv.field_size_limit(limit)
        if table:
            yield numbers, table


def _read_jsonl(path: Path) -> Iterator[Rows]:
    with _open_text(path, "\n") as file:
        lines = enumerate(file, start=1)
        while some := list(itertools.islice(lines, _BATCH)):
            records = {number: _record(path, number, line.removesuffix("\n")) for number, line in some if line.strip()}
            names = dict.fromkeys(name for record in records.values() for name in record)
            columns: dict[str, Sequence[Any]] = {
                name: [record.get(name) for record in records.values()] for name in names
            }
            yield Rows(str(path), columns, list(records))


def _first_record(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of the first line, whose names are those of the columns."""
    _checked_header(path, [name for name, _ in pairs])
    return dict(pairs)


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=None if number > 1 else functools.partial(_first_record, path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number} is not JSON: {error}", "Each line holds one JSON object.") from error
    if not isinstance(record, dict):
        raise DataError(
            f"{path}, line {number} is not a JSON object but: {line[:60]}", 'Write {"text": …, "label": …}.'
        )
    return record


def _read_parquet(path: Path) -> Iterator[Rows]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file, first = parquet.ParquetFile(path), 1
        names = _checked_header(path, file.schema_arrow.names)
        yield Rows(str(path), dict.fromkeys(names, ()), range(1, 1), unit="row")
        for batch in file.iter_batches(_BATCH):
            columns = {name: batch.column(index).to_pylist() for index, name in enumerate(batch.schema.names)}
            yield Rows(str(path), columns, range(first, first + batch.num_rows), unit="row")
            first += batch.num_rows
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"'{path}' is not readable Parquet: {first_line(error)}", "Write or copy it again.") from error


def _checked_header(path: Path, header: list[str]) -> list[str]:
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{path} names the column '{name}' twice", "Columns need names of their own.")
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


_READERS: dict[str, Callable[[Path], Iterator[Rows]]] = {
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
