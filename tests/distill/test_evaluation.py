"""Scores of saved models: what the record says is used, what is not known is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.distill.evaluation import encode_split, evaluate_model, predict, selection_score
from kdcache.distill.student import Student, build_student
from kdcache.distill.student_files import save_student, student_record
from kdcache.errors import DataError, ModelError, RecipeError
from kdcache.recipe import StudentSection
from kdcache.report.metrics import scores
from kdcache.testing.tiny import make_model, reviews, write_reviews


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
    found = predict(student.model, split, batch=1)
    assert student.model.training
    student.model.eval()
    for row in (0, 7, 49):
        inputs = student.tokenizer(texts[row][0], return_tensors="pt", truncation=True, max_length=24)
        with torch.no_grad():
            assert np.allclose(student.model(dict(inputs)).logits[0].numpy(), found[row], atol=1e-5)
    assert np.allclose(predict(student.model, split, batch=64), found, atol=1e-5)


def test_columns_come_from_the_record(tmp_path: Path, saved: Path, student: Student) -> None:
    rows = reviews(40, seed=5)
    found = evaluate_model(saved, str(write_reviews(tmp_path / "test.tsv", rows)))
    split = encode_split(student, [(text,) for text, _ in rows], np.array([label for _, label in rows]))
    expected = scores(split.labels, predict(student.model.cpu(), split))
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
