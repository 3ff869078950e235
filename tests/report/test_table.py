"""The results table, its Markdown, the verdict and the model card, from plain results."""

from __future__ import annotations

from typing import Any

import pytest

from kdcache.report.cards import model_card
from kdcache.report.table import markdown, millions, result_rows, table, verdict


def scored(accuracy: float) -> dict[str, float]:
    return {"accuracy": accuracy, "macro_f1": accuracy - 0.01, "matthews": 2 * accuracy - 1, "loss": 0.3}


def results(accuracy: float, method: str = "mt-bert", rows: int = 2000) -> dict[str, Any]:
    return {
        "name": "reviews",
        "method": method,
        "scores": {"validation": scored(0.8), "test": scored(accuracy)},
        "rows": {"test": rows},
        "student": {"parameters": 17_200_000, "latency_ms": 1.94, "head": "standard"},
        "teachers": {"bert": {"parameters": 22_700_000, "latency_ms": 4.0, "scores": {"test": scored(0.85)}}},
        "label_names": ["negative", "positive"],
        "licence": "MIT",
    }


def test_rows_are_teachers_then_the_student_alone_then_the_student() -> None:
    columns, rows = table(result_rows(results(0.84), results(0.82, "fine-tune")))
    assert columns[:4] == ["model", "parameters", "ms/text", "test accuracy"]
    assert columns[-1] == "validation accuracy"
    assert [row[0] for row in rows] == ["teacher bert", "student without teachers", "student, mt-bert"]
    assert rows[2] == ["student, mt-bert", "17.2M", "1.9", "0.8400", "0.8300", "0.6800", "0.8000"]
    assert rows[0][-1] is None  # the teacher was not scored on validation


def test_without_test_the_table_shows_validation() -> None:
    without = results(0.84)
    del without["scores"]["test"], without["teachers"]
    columns, rows = table(result_rows(without))
    assert columns[3:] == ["validation accuracy", "validation macro-F1", "validation Matthews"]
    assert len(rows) == 1


def test_markdown_has_one_line_per_row() -> None:
    assert markdown(["a", "b"], [["x", None], ["y", 2]]) == "| a | b |\n| --- | ---: |\n| x |  |\n| y | 2 |\n"


@pytest.mark.parametrize(
    ("ours", "theirs", "phrase"),
    [
        (0.90, 0.80, "is better than"),
        (0.82, 0.81, "within chance"),
        (0.81, 0.82, "is not better than"),
        (0.70, 0.82, "is worse than"),
    ],
)
def test_the_verdict_follows_the_standard_error(ours: float, theirs: float, phrase: str) -> None:
    sentence = verdict(results(ours), results(theirs, "fine-tune"))
    assert phrase in sentence
    assert f"{abs(ours - theirs) * 100:.1f} points of test accuracy" in sentence


def test_a_draw_is_called_a_draw() -> None:
    assert "scores exactly what" in verdict(results(0.82), results(0.82, "fine-tune"))


def test_no_verdict_without_scored_rows() -> None:
    assert "no labelled split" in verdict(results(0.9, rows=0), results(0.8))


def test_millions() -> None:
    assert (millions(17_210_112), millions(12_345), millions(None)) == ("17.2M", "12.3k", None)


def test_the_card_says_what_the_student_is() -> None:
    card = model_card(results(0.84))
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in (
        "license: mit",
        "# reviews",
        "- Method: mt-bert",
        "- Teachers: bert",
        "| student, mt-bert | 17.2M |",
        "pipeline(",
    ):
        assert part in card


def test_the_card_of_a_shared_head_does_not_promise_transformers() -> None:
    document = results(0.84)
    document["student"]["head"] = "shared"
    assert "pipeline(" not in model_card(document)
    assert "model.onnx" in model_card(document)


def test_a_licence_in_prose_is_no_metadata() -> None:
    card = model_card(results(0.84) | {"licence": "the data: for research; teachers: Apache-2.0"})
    assert "license:" not in card
    assert "- Licence: the data: for research" in card
