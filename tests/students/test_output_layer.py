"""A student that starts from a classifier predicts the task's classes, whatever their order in the classifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from kdcache.errors import ModelError
from kdcache.recipe import StudentSection, TeacherSection
from kdcache.students.build import build_student
from kdcache.students.model import Student
from kdcache.students.output_layer import settle_output_layer
from kdcache.teachers.bundle import Bundle, load_teacher, write_bundle
from kdcache.teachers.registration import save_teachers
from kdcache.teachers.sources import open_source
from kdcache.testing.architectures import ARCHITECTURES
from kdcache.testing.tiny import make_model

LABELS = ("bad", "good", "mixed")
OTHER_ORDER = ("good", "Mixed", "bad")  # its output 2 is class 0
INPUTS = {"input_ids": torch.tensor([[1, 5, 6, 7, 2], [1, 8, 9, 5, 2]]), "attention_mask": torch.ones(2, 5).long()}
HEADS = [name for name, entry in ARCHITECTURES.items() if entry.kind != "encoder-decoder" and name != "Funnel"]


def classifier(directory: Path, names: tuple[str, ...], architecture: str = "RoBERTa") -> Path:
    named: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    return ARCHITECTURES[architecture].save(directory, "classifier", **named)


def build(source: Path | str, label_names: tuple[str, ...] = LABELS, **options: Any) -> Student:
    section = StudentSection(init_from=str(source))
    return build_student(section, label_names, **({"max_length": 32, "seed": 0, "dropout": 0.0} | options))


def loaded(source: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32).eval()


def logits(student: Student) -> Tensor:
    with torch.no_grad():
        found: Tensor = student.model.eval()(INPUTS).logits
    return found


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict())


def differing(one: nn.Module, other: nn.Module) -> set[str]:
    theirs = tensors(other)
    return {name for name, tensor in tensors(one).items() if not torch.equal(tensor, theirs[name])}


@pytest.mark.parametrize("architecture", HEADS)
def test_the_classes_of_a_classifier_in_another_order(architecture: str, tmp_path: Path) -> None:
    expected = logits(build(classifier(tmp_path / "plain", LABELS, architecture)))
    assert expected.std(dim=1).min() > 1e-4
    student = build(classifier(tmp_path / "source", OTHER_ORDER, architecture))
    torch.testing.assert_close(logits(student), expected[:, [2, 0, 1]])  # the same weights under other names
    assert student.model.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("names", [LABELS, ("BAD", "good", "Mixed"), ("LABEL_0", "LABEL_1", "LABEL_2")])
def test_the_same_order_changes_nothing(names: tuple[str, ...], tmp_path: Path) -> None:
    source = classifier(tmp_path, names)
    assert not differing(build(source).model.network, loaded(source))


@pytest.mark.parametrize("architecture", ["RoBERTa", "ModernBERT", "GPT-2"])
def test_other_classes_are_drawn_as_absent_ones(architecture: str, tmp_path: Path) -> None:
    source = classifier(tmp_path / "source", ("sports", "politics", "weather"), architecture)
    student = build(source)
    changed = differing(student.model.network, loaded(source))
    assert changed and all(len(tensors(student.model.network)[name]) == 3 for name in changed)
    without = classifier(tmp_path / "without", LABELS, architecture)
    kept = {name: own for name, own in load_file(without / "model.safetensors").items() if name not in changed}
    save_file(kept, without / "model.safetensors", {"format": "pt"})
    assert not differing(build(without).model.network, student.model.network)
    assert differing(build(source, seed=1).model.network, student.model.network) == {
        name for name in changed if "bias" not in name
    }


def test_numbered_classes_are_kept_where_the_numbers_are_known(tmp_path: Path) -> None:
    """As those of a teacher with a head of its own."""
    source = classifier(tmp_path / "source", ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert not differing(build(source, ("1", "2", "3"), labels_declared=False).model.network, loaded(source))
    assert "classifier.out_proj.weight" in differing(build(source, labels_declared=False).model.network, loaded(source))


def test_a_teacher_with_its_own_head_in_another_order(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "roberta", classes=3, id2label=dict(enumerate(OTHER_ORDER)))
    source = open_source(TeacherSection(name="own", model=str(model), head="own"), 32, LABELS)
    bundle = save_teachers(tmp_path / "teachers", Bundle(LABELS, ("sentence",), {}), None, {"own": source}, {})
    write_bundle(tmp_path / "teachers", bundle)
    with torch.no_grad():
        expected = load_teacher(tmp_path / "teachers", "own").model(INPUTS).logits
    torch.testing.assert_close(logits(build("teacher:own", teachers_dir=tmp_path / "teachers")), expected)
    turned = build("teacher:own", ("mixed", "bad", "good"), teachers_dir=tmp_path / "teachers")
    torch.testing.assert_close(logits(turned), expected[:, [2, 0, 1]])


def test_a_teacher_whose_classes_were_declared_once_keeps_them(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "bert", classes=3)
    source = open_source(TeacherSection(name="own", model=str(model), head="own"), 32, LABELS)
    bundle = save_teachers(tmp_path / "teachers", Bundle(LABELS, ("sentence",), {}), None, {"own": source}, {})
    write_bundle(tmp_path / "teachers", bundle)
    student = build("teacher:own", teachers_dir=tmp_path / "teachers", labels_declared=False)
    assert not differing(student.model.network, loaded(tmp_path / "teachers" / "own"))
    write_bundle(tmp_path / "teachers", replace(bundle, label_names=("sad", "glad", "neither")))
    other = build("teacher:own", teachers_dir=tmp_path / "teachers")
    assert "classifier.weight" in differing(other.model.network, loaded(tmp_path / "teachers" / "own"))


class Biased(BertForSequenceClassification):
    """Adds numbers to its logits that are not part of a layer."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        output = super().forward(*inputs, **named)
        output.logits = output.logits + torch.arange(3.0)
        return output


class Fixed(BertForSequenceClassification):
    """Has three classes whatever its config says."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, 3)


def test_rows_that_cannot_be_put_in_order_are_drawn_anew_or_refused(tmp_path: Path) -> None:
    source = classifier(tmp_path, OTHER_ORDER, "BERT")

    def output_layer(kind: type[BertForSequenceClassification]) -> Tensor:
        network: Any = kind.from_pretrained(source)
        settle_output_layer(network, "it", dict(enumerate(OTHER_ORDER)), LABELS, (), labels_declared=True)
        weight: Tensor = network.classifier.weight
        return weight

    rows = loaded(source).classifier.weight
    assert torch.equal(output_layer(BertForSequenceClassification), rows[[2, 0, 1]])
    drawn = output_layer(Biased)
    assert not any(torch.equal(row, own) for row in rows for own in drawn)
    with pytest.raises(ModelError, match="predicts good, Mixed, bad, the task's labels are bad, good, mixed") as caught:
        output_layer(Fixed)
    assert "student.init_from" in caught.value.hint
