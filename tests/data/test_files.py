"""Readers: what is in a file arrives as it is, and what is wrong with it is told with file and line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from kdcache.data.labels import class_order, label_cells
from kdcache.data.reading import _READERS, read_rows
from kdcache.errors import DataError
from kdcache.recipe import DATA_FILE_ENDINGS

QUOTES = [
    'he said "no" .',
    '"',
    '""quoted""',
    "it's",
    'open " only',
    "a,b",
    "crème 日本 🙂",
    " leading and trailing ",
    "a\u2028b\x0cc",
]
printable = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1)
tables = st.lists(st.tuples(printable, printable), min_size=1, max_size=8)


def write(directory: Path, name: str, content: str | bytes) -> str:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_quotation_marks_in_tsv_are_ordinary_characters(tmp_path: Path) -> None:
    lines = [f"{text}\t{number}" for number, text in enumerate(QUOTES)]
    rows = read_rows(write(tmp_path, "a.tsv", "\n".join(["text\tlabel", *lines])))
    assert list(rows.columns["text"]) == QUOTES
    assert list(rows.columns["label"]) == [str(number) for number in range(len(QUOTES))]
    assert rows.place(2).endswith("a.tsv, line 4")


@given(tables)
def test_every_format_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]]
) -> None:
    directory = tmp_path_factory.mktemp("files")
    as_csv = io.StringIO()
    csv.writer(as_csv).writerows([("a", "b"), *table])
    sources = [
        write(directory, "t.tsv", "\n".join("\t".join(row) for row in [("a", "b"), *table]) + "\n"),
        write(directory, "t.csv", as_csv.getvalue()),
        write(directory, "t.jsonl", "".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in table)),
        str(directory / "t.parquet"),
    ]
    parquet.write_table(pa.table({"a": [a for a, _ in table], "b": [b for _, b in table]}), sources[-1])
    for source in sources:
        rows = read_rows(source)
        assert list(zip(rows.columns["a"], rows.columns["b"], strict=True)) == table


def test_windows_line_ends_byte_order_marks_and_blank_last_lines_are_no_content(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "a.TSV", b"\xef\xbb\xbftext\tlabel\r\nfine\t1\r\n\r\n"))
    assert rows.columns == {"text": ("fine",), "label": ("1",)}


def test_csv_fields_may_hold_commas_quotes_and_line_breaks_and_rows_keep_their_first_line(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "a.csv", 'text,label\n"two\nlines",0\n\n"say ""so"", he said",1\n'))
    assert list(rows.columns["text"]) == ["two\nlines", 'say "so", he said']
    assert list(rows.lines) == [2, 5]


def test_csv_fields_may_be_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    rows = read_rows(write(tmp_path, "a.csv", f"text\n{'x' * 200_000}\n"))
    assert len(rows.columns["text"][0]) == 200_000
    assert csv.field_size_limit() == limit


def test_json_lines_may_leave_keys_out_and_blank_lines_between(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "a.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b"}\n'))
    assert rows.columns == {"text": ["a", "b"], "label": [1, None]}
    assert list(rows.lines) == [1, 3]


def test_parquet_dictionaries_large_strings_and_nulls_are_read(tmp_path: Path) -> None:
    table = pa.table(
        {"text": pa.array(["a", "b"], pa.large_string()), "label": pa.array(["x", None]).dictionary_encode()}
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"))
    assert rows.columns == {"text": ["a", "b"], "label": ["x", None]}
    assert rows.place(1).endswith("a.parquet, row 2")


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet names the column 'text' twice"):
        read_rows(str(tmp_path / "a.parquet"))


def test_booleans_beside_their_numbers_are_no_classes_of_their_own(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "a.jsonl", b'{"label": true}\n{"label": false}\n{"label": 1}\n'))
    with pytest.raises(DataError, match=r"line 3.* the label is '1', and the same column has 'false', 'true'"):
        class_order(rows, label_cells(rows, "label"), "label")


BAD = [
    ("a.tsv", b"text\tlabel\nfine\t1\nno tab\n", "a.tsv, line 3 has 1 fields; the header has 2: text, label"),
    ("a.tsv", b"text\tlabel\nfine\t1\t2\n", "a.tsv, line 2 has 3 fields"),
    ("a.tsv", b"text\tlabel\n\nfine\t1\n", "a.tsv, line 2 has 1 fields"),
    ("a.tsv", b"text\tlabel\nok\t1\nbad \xff\t0\n", "a.tsv, line 3 is not UTF-8: byte 0xff"),
    ("a.tsv", b"text\tlabel\nok\t1\nbad \x00\t0\n", "a.tsv, line 3 holds a NUL byte"),
    ("a.tsv", "text\n".encode("utf-16"), "a.tsv, line 1 holds a NUL byte"),
    ("a.tsv", b"text\ttext\na\tb\n", "a.tsv names the column 'text' twice"),
    ("a.tsv", b"", "is empty; a header and rows were expected"),
    ("a.tsv", b"\n\n", "is empty; a header and rows were expected"),
    ("a.tsv", b"text\tlabel\n", "holds no rows, only a header"),
    ("a.csv", b"", "is empty"),
    ("a.csv", b"text,label\n", "holds no rows, only a header"),
    ("a.csv", b'text,label\n"a",1\n"open,0\n', "a.csv, line 3 is not CSV: unexpected end of data"),
    ("a.csv", b'text,label\n"a"b,1\n', "a.csv, line 2 is not CSV: ',' expected after"),
    ("a.csv", b'text,label\n"a\nb",1\nx,y,z\n', "a.csv, line 4 has 3 fields; the header has 2"),
    ("a.csv", b"text,label\na,1\n\xe9,0\n", "a.csv, line 3 is not UTF-8: byte 0xe9"),
    ("a.jsonl", b'{"text": "a"}\n{"text": }\n', "a.jsonl, line 2 is not JSON: Expecting value"),
    ("a.jsonl", b'["a"]\n', 'a.jsonl, line 1 is not a JSON object but: ["a"]'),
    ("a.jsonl", b'{"text": "a", "text": "b"}\n', "a.jsonl names the column 'text' twice"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1 is not JSON"),
    ("a.jsonl", b"\n", "is empty"),
    ("a.parquet", b"PAR1 but not really", "is not readable Parquet"),
    ("a.parquet", b"", "is not readable Parquet"),
    ("a.xlsx", b"PK", "has the ending '.xlsx', which is not known; known are .tsv, .csv, .jsonl, .ndjson, .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_what_is_wrong_with_a_file_is_told_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, name, content))
    assert message in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert caught.value.exit_code == 2


def test_truncated_parquet_is_an_error(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(DataError, match="is not readable Parquet"):
        read_rows(write(tmp_path, "cut.parquet", whole[: len(whole) // 2]))


@pytest.mark.parametrize("source", ["no.tsv", "./no", "a/b/c", "no.PARQUET", "../x.csv"])
def test_a_missing_path_is_named_in_full(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        read_rows(source)
    assert f"'{(tmp_path / source).absolute()}'" in caught.value.message


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a directory; a data file was expected"):
        read_rows(str(tmp_path))


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "a.tsv", "sentence\tlabel\na\t1\n"))
    with pytest.raises(DataError) as caught:
        rows.column("text", "text")
    assert "has no column 'text'; it has: 'sentence', 'label'" in caught.value.message
    assert caught.value.hint == "Set data.text to one of these; for kdcache evaluate: --text."


def test_recipes_know_the_same_file_endings() -> None:
    assert tuple(_READERS) == DATA_FILE_ENDINGS
