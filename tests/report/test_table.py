"""The results table, its Markdown, the verdict and the model card, from plain results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdcache.report.cards import model_card
from kdcache.report.metrics import scores
from kdcache.report.table import data_notes, learned_nothing, markdown, millions, remarks, result_rows, table, verdict


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


def constant(accuracy: float, method: str = "mt-bert", rows: int = 500) -> dict[str, Any]:
    """A student that gives every row the same answer, which is right on ``accuracy`` of them."""
    document = results(accuracy, method, rows)
    document["scores"]["test"] = {"accuracy": accuracy, "macro_f1": 0.06, "matthews": 0.0, "loss": 1.7}
    return document


def test_a_student_that_answers_one_class_is_not_called_better() -> None:
    sentence = verdict(constant(0.276), constant(0.218, "fine-tune"))
    assert "better" not in sentence
    assert "learned nothing" in sentence
    assert "0.276" in sentence and "0.218" in sentence


def test_every_model_that_learned_nothing_is_named() -> None:
    document = constant(0.276)
    document["teachers"]["bert"]["scores"]["test"]["matthews"] = -0.02
    said = remarks(document, results(0.84, "fine-tune"))
    assert [line.split(" learned nothing")[0] for line in said] == ["The teacher bert", "The student, mt-bert"]
    assert remarks(results(0.84), results(0.82, "fine-tune")) == []


def test_teachers_below_the_student_alone_are_named() -> None:
    document, alone = results(0.84), results(0.82, "fine-tune")
    document["teachers"] = {
        name: {"scores": {"validation": scored(accuracy), "test": scored(0.9)}}
        for name, accuracy in (("below", 0.79), ("equal", 0.8), ("above", 0.9))
    }
    (said,) = remarks(document, alone)
    assert said.startswith("Teacher below has a lower validation accuracy (0.790) than the student without teachers")
    assert "0.800" in said
    assert remarks(document) == []


@pytest.mark.parametrize("seed", range(5))
def test_answers_that_do_not_depend_on_the_label_count_as_nothing_and_those_that_do_count(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, 1000)
    blind = random.normal(size=(1000, 4))
    blind[:, 1] += 2  # nearly always the same answer
    seeing = blind + 2 * np.eye(4)[labels]
    assert learned_nothing(scores(labels, blind), 1000)
    assert not learned_nothing(scores(labels, seeing), 1000)
    assert not learned_nothing(
        scores(np.zeros(9, np.int64), np.eye(4)[[0] * 9]), 9
    )  # one class, and every answer right


def test_what_was_cut_and_left_out_is_said_under_the_table() -> None:
    document = results(0.84) | {"max_length": 128, "empty_rows": {"train": 3}}
    document["truncated"] = {"student": {"train": 0.25, "test": 0.0}, "teachers": {"bert": 0.0001, "roberta": 0.0}}
    assert data_notes(document) == [
        "The student: 25.0% (train) of the texts are cut at its max_length of 128 tokens.",
        "Teacher bert: under 0.1% of the texts were cut at its max_length.",
        "train: 3 rows without text are left out.",
    ]
    assert data_notes(results(0.84)) == []  # results of 0.1.0 do not say


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
