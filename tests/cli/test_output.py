"""What goes to which stream, for humans and as JSON."""

from __future__ import annotations

import json

import pytest

from kdcache.cli.output import Output, table_lines


def test_a_human_sees_text_and_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.document({"a": 1})
    out.text("line")
    out.dict({"name": "x", "more": {"rows": 3, "list": [1, 2]}})
    out.table(("name", "score"), [("x", 0.5), ("long name", None)])
    out.note("by the way")
    out.hint("do this")
    out.error("it\nbroke", "mend it")
    captured = capsys.readouterr()
    assert (
        captured.out == "line\nname  x\nmore\n  rows  3\n  list  1, 2\n"
        "name        score\n---------  ------\nx          0.5000\nlong name\n"
    )
    assert captured.err == "by the way\nhint: do this\nerror: it broke\nhint: mend it\n"


def test_json_mode_prints_one_document_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.json = True
    out.document({"score": float("nan"), "rows": (1, 2), "name": "é"})
    out.text("line")
    out.dict({"a": 1})
    out.table(("a",), [(1,)])
    out.error("broke", "mend it")
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"score": None, "rows": [1, 2], "name": "é"}
    assert json.loads(captured.err) == {"error": "broke", "hint": "mend it"}


@pytest.mark.parametrize("json_mode", [False, True])
def test_a_quiet_process_prints_errors_alone(capsys: pytest.CaptureFixture[str], json_mode: bool) -> None:
    out = Output()
    out.json, out.quiet = json_mode, True
    out.document({"a": 1})
    out.text("a line")
    out.dict({"a": 1})
    out.table(("a",), [(1,)])
    out.note("a note")
    out.hint("a hint")
    assert capsys.readouterr() == ("", "")
    out.error("wrong", "cure")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == ('{"error": "wrong", "hint": "cure"}\n' if json_mode else "error: wrong\nhint: cure\n")


def test_numbers_stand_to_the_right() -> None:
    assert table_lines(("n", "rows"), [("a", 1), ("b", 100)]) == ["n  rows", "-  ----", "a     1", "b   100"]


def test_a_table_that_is_too_wide_for_the_terminal_stacks_its_header() -> None:
    columns, rows = (
        ("model", "test accuracy", "ms/text"),
        [("teacher bert", "0.5", 3), ("student, mt-bert", "0.75", 10)],
    )
    assert table_lines(columns, rows, 40) == table_lines(columns, rows)
    assert table_lines(columns, rows, 39) == [
        "                  test",
        "model             accuracy  ms/text",
        "----------------  --------  -------",
        "teacher bert      0.5             3",
        "student, mt-bert  0.75           10",
    ]
    assert table_lines(columns, rows, 30) == [
        "           test",
        "model      accuracy  ms/text",
        "---------  --------  -------",
        "teacher    0.5             3",
        "  bert",
        "student,   0.75           10",
        "  mt-bert",
    ]
    assert table_lines((), [], 1) == ["", ""]


def test_results_of_three_models_fit_eighty_columns() -> None:
    columns = (
        "model",
        "parameters",
        "ms/text",
        "test accuracy",
        "test macro-F1",
        "test Matthews",
        "validation accuracy",
    )
    rows = [
        (model, "17.4M", "12.0", "0.9", "0.9", "0.8", "0.9") for model in ("student without teachers", "teacher bert")
    ]
    assert max(map(len, table_lines(columns, rows, 80))) <= 80 < max(map(len, table_lines(columns, rows)))
