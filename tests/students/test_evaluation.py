"""Scores of saved models: what the record says is used, what is not known is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.data.encoding import encode, padding_id
from kdcache.errors import DataError, ModelError, RecipeError
from kdcache.recipe import StudentSection
from kdcache.report.metrics import scores
from kdcache.students.build import build_student
from kdcache.students.model import Student
from kdcache.students.save import load_student, save_student, student_record
from kdcache.students.score import encode_split, evaluate_model, selection_score, split_logits
from kdcache.teachers.bundle import load_teacher, read_bundle, write_bundle
from kdcache.testing.teachers import make_teachers
from kdcache.testing.tiny import make_model, reviews, write_reviews
from kdcache.training.predict import predict


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    path = make_model(tmp_path_factory.mktemp("evaluation") / "bert", "bert", depth=2)
    return build_student(StudentSection(init_from=str(path)), ("0", "1"), max_length=24, seed=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, student: Student) -> Path:
    directory = tmp_path_factory.mktemp("evaluation") / "student"
    record = student_record(student, name="t", method="kd", text_columns=("sentence",), label_column="label")
    save_student(directory, student, record, "card")
    return directory


def test_logits_come_in_the_order_of_the_rows_whatever_the_batch(student: Student) -> None:
    texts = [(text,) for text, _ in reviews(50)]
    split = encode_split(student, texts, np.zeros(50, np.int64))
    student.model.train()
    found = split_logits(student.model, split, batch=1)
    assert student.model.training
    student.model.eval()
    for row in (0, 7, 49):
        inputs = student.tokenizer(texts[row][0], return_tensors="pt", truncation=True, max_length=24)
        with torch.no_grad():
            assert np.allclose(student.model(dict(inputs)).logits[0].numpy(), found[row], atol=1e-5)
    assert np.allclose(split_logits(student.model, split, batch=64), found, atol=1e-5)


def test_columns_come_from_the_record(tmp_path: Path, saved: Path, student: Student) -> None:
    rows = reviews(40, seed=5)
    found = evaluate_model(saved, str(write_reviews(tmp_path / "test.tsv", rows)))
    split = encode_split(student, [(text,) for text, _ in rows], np.array([label for _, label in rows]))
    expected = scores(split.labels, split_logits(student.model.cpu(), split))
    assert found == {**{name: pytest.approx(value, abs=1e-5) for name, value in expected.items()}, "rows": 40}


def test_columns_can_be_named_otherwise(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("words,gold\nthe film is good,1\nthe film is bad,0\n")
    assert evaluate_model(saved, str(path), text=["words"], label="gold", max_length=8)["rows"] == 2
    with pytest.raises(DataError, match="sentence"):
        evaluate_model(saved, str(path))


def test_a_model_from_elsewhere_needs_columns(tmp_path: Path) -> None:
    model = make_model(tmp_path / "classifier", "roberta", depth=1, classes=2)
    path = tmp_path / "data.csv"
    path.write_text("words,gold\nthe film is good,1\nthe film is bad,0\n")
    with pytest.raises(RecipeError, match="no record") as caught:
        evaluate_model(model, str(path))
    assert "--text" in caught.value.hint
    assert evaluate_model(model, str(path), text=["words"], label="gold")["rows"] == 2


def test_a_bare_encoder_is_no_classifier(tmp_path: Path) -> None:
    model = make_model(tmp_path / "encoder", "bert", depth=1)
    path = write_reviews(tmp_path / "test.tsv", reviews(4))
    with pytest.raises(ModelError, match="no finished classifier"):
        evaluate_model(model, str(path), text=["sentence"], label="label")


def test_selection_by_loss_turns_its_sign() -> None:
    assert selection_score({"accuracy": 0.5, "loss": 0.3}, "loss") == -0.3
    assert selection_score({"accuracy": 0.5, "loss": 0.3}, "accuracy") == 0.5


def _named(tmp_path: Path, *, declared: bool | None) -> Path:
    """A student whose classes are words."""
    path = make_model(tmp_path / "encoder", "bert", depth=1)
    made = build_student(StudentSection(init_from=str(path)), ("bad", "good", "mixed"), max_length=8, seed=0)
    record = student_record(
        made, name="t", method="kd", text_columns=("text",), label_column="label", labels_declared=declared
    )
    save_student(tmp_path / "student", made, record, "card")
    return tmp_path / "student"


def _file(tmp_path: Path, labels: list[str]) -> str:
    path = tmp_path / "data.tsv"
    path.write_text("text\tlabel\n" + "".join(f"the film is {row} good\t{label}\n" for row, label in enumerate(labels)))
    return str(path)


def test_numbers_in_a_file_against_sorted_names_of_a_student_need_their_meaning(tmp_path: Path) -> None:
    student = _named(tmp_path, declared=False)
    expected = evaluate_model(student, _file(tmp_path, ["good", "mixed", "bad", "good"]))
    file = _file(tmp_path, ["0", "1", "2", "0"])
    with pytest.raises(
        DataError, match=r"line 2, column 'label': the label is '0', and .* has 'bad', 'good', 'mixed'"
    ) as caught:
        evaluate_model(student, file)
    assert "--labels" in caught.value.hint
    assert evaluate_model(student, file, labels=["good", "mixed", "bad"]) == expected
    with pytest.raises(RecipeError, match="--labels are good, bad; model"):
        evaluate_model(student, file, labels=["good", "bad"])


@pytest.mark.parametrize("declared", [True, None])
def test_numbers_in_a_file_against_declared_names_are_class_numbers(tmp_path: Path, declared: bool | None) -> None:
    student = _named(tmp_path, declared=declared)  # None: a student of 0.1.0, whose record does not say
    expected = evaluate_model(student, _file(tmp_path, ["bad", "good", "mixed", "bad"]))
    assert evaluate_model(student, _file(tmp_path, ["0", "1", "2", "0"])) == expected


@pytest.mark.parametrize("recorded", [{}, {"labels_declared": False}, {"labels_declared": True}])
def test_numbers_in_a_file_for_a_teacher_need_their_meaning_too(tmp_path: Path, recorded: dict[str, bool]) -> None:
    """{}: teachers of 0.1.0, which did not say whether the order of the names was declared."""
    teachers = make_teachers(
        tmp_path / "teachers", {"bert": "bert"}, label_names=("bad", "good", "mixed"), text_columns=("text",), depth=1
    )
    write_bundle(teachers, replace(read_bundle(teachers), training=recorded))
    expected = evaluate_model(teachers / "bert", _file(tmp_path, ["good", "mixed", "bad", "good"]), label="label")
    file = _file(tmp_path, ["0", "1", "2", "0"])
    if recorded.get("labels_declared"):
        assert evaluate_model(teachers / "bert", file, label="label")["rows"] == 4
    else:
        with pytest.raises(DataError, match=r"the label is '0', and .* has 'bad', 'good', 'mixed'") as caught:
            evaluate_model(teachers / "bert", file, label="label")
        assert "--labels" in caught.value.hint
    assert evaluate_model(teachers / "bert", file, label="label", labels=["good", "mixed", "bad"]) == expected


def test_a_length_beyond_the_positions_is_refused(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text("sentence\tlabel\nthe film is good\t1\n" + "the film is " * 60 + "bad\t0\n")
    teachers = make_teachers(tmp_path / "teachers", {"roberta": "roberta"}, depth=1)
    for model, limit in ((saved, 80), (teachers / "roberta", 78)):
        assert evaluate_model(model, str(path), label="label", max_length=limit)["truncated"] == 1
        with pytest.raises(ModelError, match=f"max_length is {limit + 1}, but .* has positions for {limit} tokens"):
            evaluate_model(model, str(path), label="label", max_length=limit + 1)


def test_a_model_from_elsewhere_reads_what_it_has_positions_for(tmp_path: Path) -> None:
    """Where its tokenizer does not say how many these are."""
    model = make_model(tmp_path / "classifier", "roberta", depth=1, classes=2)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("model_max_length", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    path = tmp_path / "data.csv"
    path.write_text("words,gold\n" + "the film is " * 60 + "good,1\n")
    found = evaluate_model(model, str(path), text=["words"], label="gold", speed=True)
    assert found["truncated"] == 1
    same = evaluate_model(model, str(path), text=["words"], label="gold", max_length=78)
    assert found["loss"] == same["loss"]
    assert load_student(model).max_length == 78  # what an export cuts texts to


def test_a_record_of_0_1_0_is_read(tmp_path: Path) -> None:
    student = _named(tmp_path, declared=True)
    record = json.loads((student / "kdcache.json").read_text())
    del record["labels_declared"]
    (student / "kdcache.json").write_text(json.dumps(record))
    assert evaluate_model(student, _file(tmp_path, ["0", "good"]))["rows"] == 2


def test_rows_that_are_left_out_or_cut_are_counted(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text("sentence\tlabel\n \t1\nthe film is good\t1\n" + "the film is " * 20 + "bad\t0\n")
    found = evaluate_model(saved, str(path))
    assert (found["rows"], found["left_out"], found["truncated"]) == (2, 1, 1)


def test_a_teacher_is_scored_and_timed(tmp_path: Path) -> None:
    teachers = make_teachers(tmp_path / "teachers", {"roberta": "roberta"}, widths={"roberta": 24})
    rows = reviews(6)
    file = str(write_reviews(tmp_path / "test.tsv", rows))
    found = evaluate_model(teachers / "roberta", file, label="label", speed=True)
    teacher = load_teacher(teachers, "roberta")
    encoded = encode(teacher.tokenizer, [(text,) for text, _ in rows], teacher.max_length)
    logits = predict(teacher.model, encoded, padding_id(teacher.tokenizer))
    expected = scores(np.array([label for _, label in rows]), logits)
    assert found.items() >= {name: pytest.approx(value, abs=1e-5) for name, value in expected.items()}.items()
    assert found["latency_ms"] > 0
    assert found["texts_per_second"] > 0
    with pytest.raises(RecipeError, match="no record of its text and label columns"):
        evaluate_model(teachers / "roberta", file)
