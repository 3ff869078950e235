"""Models with Python code of their own.

Run where the recipe says so, never otherwise, and the student takes its code along.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.data.encoding import load_tokenizer
from kdcache.errors import CustomCodeError, KdcacheError, ModelError
from kdcache.recipe import StudentSection
from kdcache.students.build import build_student
from kdcache.students.model import Student
from kdcache.students.save import load_student, read_record, save_student, student_record
from kdcache.teachers.fingerprints import fingerprint_teacher
from kdcache.teachers.teacher import TeacherModel, load_classifier, load_encoder
from kdcache.testing.custom_model import RAN, make_custom_model
from kdcache.testing.student_check import TEXTS, check_student
from kdcache.testing.teachers import make_teachers


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that appears where the model's code is run; modules of earlier loads are forgotten."""
    monkeypatch.setenv(RAN, str(tmp_path / "ran"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "ran"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_custom_model(tmp_path / "custom")


def build(model: Path, **settings: Any) -> Student:
    return build_student(StudentSection(init_from=str(model), **settings), ("0", "1"), max_length=64, seed=0)


def test_code_is_not_run_unless_asked_for(model: Path, tmp_path: Path, ran: Path) -> None:
    classifier = make_custom_model(tmp_path / "classifier", classifier=True)
    attempts: list[Any] = [
        lambda: build(model),
        lambda: load_encoder(str(model)),
        lambda: load_classifier(str(classifier)),
        lambda: load_student(classifier),
    ]
    for attempt in attempts:
        with pytest.raises(CustomCodeError, match="Python code of its own") as caught:
            attempt()
        assert "\n" not in caught.value.message
        assert "trust_remote_code = true" in caught.value.hint
    assert not ran.exists()


@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_a_student_with_code_of_its_own(model: Path, tmp_path: Path, ran: Path, layers: list[int] | None) -> None:
    check_student(model, layers, tmp_path / "student", trust_remote_code=True)
    assert ran.exists()
    record = read_record(tmp_path / "student")
    assert record is not None
    assert record.trust_remote_code
    ran.unlink()
    with pytest.raises(CustomCodeError):
        load_student(tmp_path / "student")
    assert not ran.exists()


def test_it_loads_in_a_process_that_never_saw_its_source(model: Path, tmp_path: Path) -> None:
    import shutil

    student = build(model, layers=[1, 3], trust_remote_code=True)
    record = student_record(student, name="tiny", method="kd", text_columns=("sentence",), label_column="label")
    save_student(tmp_path / "student", student, record, "card")
    shutil.rmtree(model)
    code = (
        "import sys\n"
        "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T\n"
        "m, t = M.from_pretrained(sys.argv[1], trust_remote_code=True), T.from_pretrained(sys.argv[1], "
        "trust_remote_code=True)\n"
        "print(m.eval()(**t(sys.argv[2], return_tensors='pt', return_token_type_ids=False)).logits.tolist()[0])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "student"), TEXTS[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    with torch.no_grad():
        ours = student.model.eval()(dict(student.tokenizer(TEXTS[0], return_tensors="pt"))).logits[0]
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), ours, atol=1e-6)


def test_the_shared_head_over_code_of_its_own(model: Path, tmp_path: Path) -> None:
    teachers = make_teachers(tmp_path / "teachers", {"bert": "bert"})
    section = StudentSection(init_from=str(model), head="shared", trust_remote_code=True)
    student = build_student(section, ("0", "1"), max_length=64, seed=0, teachers_dir=teachers)
    record = student_record(student, name="tiny", method="kd", text_columns=("sentence",), label_column="label")
    save_student(tmp_path / "student", student, record, "card")
    loaded = load_student(tmp_path / "student", trust_remote_code=True)
    batch = dict(student.tokenizer(list(TEXTS), padding=True, return_tensors="pt"))
    with torch.no_grad():
        assert torch.allclose(loaded.model(batch).logits, student.model.eval()(batch).logits, atol=1e-6)


def test_code_without_a_classifier_is_no_student(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["auto_map"]["AutoModelForSequenceClassification"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot make a student of"):
        build(model, trust_remote_code=True)


def test_an_ordinary_student_says_nothing_of_code(tmp_path: Path) -> None:
    from kdcache.testing.tiny import make_model

    student = build(make_model(tmp_path / "bert", "bert"), trust_remote_code=True)
    record = student_record(student, name="tiny", method="kd", text_columns=("sentence",), label_column="label")
    save_student(tmp_path / "student", student, record, "card")
    assert "trust_remote_code" not in json.loads((tmp_path / "student" / "kdcache.json").read_text())
    assert not student.own_code


def test_other_code_is_another_teacher(model: Path, tmp_path: Path) -> None:
    """Same weights, same config: what the model computes of them is in its code."""
    other = make_custom_model(tmp_path / "other")
    path = other / "tiny_layers.py"
    path.write_text(path.read_text().replace(".tanh()", ".relu()"))
    found = []
    for place in (model, other):
        encoder = load_encoder(str(place), trust_remote_code=True)
        found.append(fingerprint_teacher(TeacherModel(encoder, None, None).eval(), load_tokenizer(str(place))))
    assert found[0].weights == found[1].weights
    assert found[0].config != found[1].config


def test_errors_have_one_line(model: Path) -> None:
    (model / "tiny_modeling.py").write_text("raise RuntimeError('one\\ntwo')\n")
    with pytest.raises(KdcacheError) as caught:
        build(model, trust_remote_code=True)
    assert "\n" not in caught.value.message
