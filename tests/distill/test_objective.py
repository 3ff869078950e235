"""The total loss: its terms against loops written out, micro-batches, presets, and a new method as one row."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.distill.objective import DistillationModel, ObjectiveSettings, objective_settings
from kdcache.distill.student import Student, build_student
from kdcache.distill.targets import Batch, Hidden, Targets
from kdcache.methods.base import Method
from kdcache.methods.parts.hidden_states import HiddenStates
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task import TaskLoss
from kdcache.methods.parts.weighting import teacher_cross_entropy
from kdcache.recipe import DistillSection, StudentSection
from kdcache.testing.tiny import make_model

ROWS, LENGTH, CLASSES = 6, 5, 2
TEACHERS = ("a", "b")
DIMS = {(0, 1): 3, (0, 2): 3, (1, 1): 4, (1, 2): 4}
VARIANCES = {(0, 1): 0.5, (0, 2): 2.0, (1, 1): 1.0, (1, 2): 3.0}
COVERED = {0: [0, 1, 2, 5, 6, 10, 16, 20, 25, 26], 1: [0, 1, 5, 11, 12, 15, 21, 29]}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    path = make_model(tmp_path_factory.mktemp("objective") / "bert", "bert", depth=2)
    return build_student(StudentSection(init_from=str(path)), ("0", "1"), max_length=16, seed=0, dropout=0.0)


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    hidden = {}
    for index, positions in COVERED.items():
        place = torch.tensor(positions)
        for layer in (1, 2):
            values = torch.randn(len(positions), DIMS[index, layer], generator=generator)
            hidden[index, layer] = Hidden(values, None, None, None, None, place)
    inputs = {
        "input_ids": torch.randint(5, 100, (ROWS, LENGTH), generator=generator),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long),
    }
    labels = torch.tensor([0, 1, -1, 1, -1, 0])
    targets = Targets(TEACHERS, 2 * torch.randn(2, ROWS, CLASSES, generator=generator), hidden)
    return Batch(inputs, labels, np.zeros((ROWS, 16), np.uint8), targets)


def model_of(student: Student, settings: ObjectiveSettings) -> DistillationModel:
    dims = DIMS if settings.needs_hidden else {}
    return DistillationModel(student.model, settings, TEACHERS, dims=dims, variances=lambda _epoch: VARIANCES, seed=0).train()


def total(model: DistillationModel, batch: Batch, pieces: int = 1) -> tuple[float, dict[str, float]]:
    counts, loss, terms = model.counts([batch]), 0.0, {}
    for piece in batch.split(pieces):
        found, parts = model(piece, counts)
        loss += found.item()
        terms = {name: terms.get(name, 0.0) + value.item() for name, value in parts.items()}
    return loss, terms


def hidden_in_loops(model: DistillationModel, batch: Batch) -> dict[tuple[int, int], float]:
    """MSE of every pair, token by token, with the matrices of the model."""
    assert batch.targets is not None
    states = model.student(batch.inputs, hidden_states=True).hidden_states
    found = {}
    for pair, target in batch.targets.hidden.items():
        teacher, layer = pair
        if model.settings.direction == "student-to-teacher":
            first = 0 if teacher == 0 else DIMS[0, layer]
            matrix = model.projections.matrices[f"layer{layer}"][first : first + DIMS[pair]]
        else:
            matrix = model.projections.matrices[f"layer{layer}-teacher{teacher}"]
        errors: list[float] = []
        for place, position in enumerate(target.positions.tolist()):
            h = states[layer][position // LENGTH][position % LENGTH]
            t = target.values[place]
            difference = matrix @ h - t if model.settings.direction == "student-to-teacher" else h - matrix @ t
            errors += [value**2 for value in difference.tolist()]
        found[pair] = sum(errors) / len(errors)
    return found


@pytest.mark.parametrize("paper", [False, True])
def test_mt_bert_is_the_sum_of_its_terms(student: Student, batch: Batch, paper: bool) -> None:
    settings = objective_settings(DistillSection(paper=paper))
    model = model_of(student, settings)
    loss, terms = total(model, batch)
    mse = hidden_in_loops(model, batch)
    if paper:
        assert terms["hidden"] == pytest.approx(sum(mse.values()), rel=1e-5)
        assert loss == pytest.approx(terms["task"] + terms["soft"] + terms["hidden"], rel=1e-6)
    else:
        assert terms["hidden"] == pytest.approx(sum(mse[pair] / VARIANCES[pair] for pair in mse) / 4, rel=1e-5)
        assert loss == pytest.approx(terms["task"] + terms["soft"] + 0.1 * terms["hidden"], rel=1e-6)
    assert terms["soft"] == pytest.approx(terms["soft/a"] + terms["soft/b"], rel=1e-6)
    assert {f"hidden/{name}/{layer}" for name in TEACHERS for layer in (1, 2)} < set(terms)
    assert 0 < terms["weight/a"] < 1


def test_kd_is_cross_entropy_with_the_mean_probability(student: Student, batch: Batch) -> None:
    model = model_of(student, objective_settings(DistillSection(method="kd", temperature=2.0, t_squared=True)))
    _, terms = total(model, batch)
    assert batch.targets is not None
    logits, expected = model.student(batch.inputs).logits, 0.0
    for row in range(ROWS):
        p = (batch.targets.logits[:, row] / 2.0).softmax(dim=-1).mean(dim=0).tolist()
        q = (logits[row] / 2.0).softmax(dim=-1).tolist()
        expected -= 4.0 * sum(a * math.log(b) for a, b in zip(p, q, strict=True)) / ROWS
    assert terms["soft"] == pytest.approx(expected, rel=1e-5)
    assert "hidden" not in terms


def test_fine_tune_ignores_targets(student: Student, batch: Batch) -> None:
    model = model_of(student, objective_settings(DistillSection(method="fine-tune")))
    assert not model.owned
    loss, terms = total(model, batch)
    assert set(terms) == {"task"}
    assert loss == terms["task"]
    assert total(model, replace(batch, targets=None)) == (loss, terms)


@pytest.mark.parametrize("method", ["mt-bert", "kd", "fine-tune"])
@pytest.mark.parametrize("pieces", [2, 4, 6])
def test_micro_batches_give_the_loss_and_gradient_of_the_step(student: Student, batch: Batch, method: str, pieces: int) -> None:
    model = model_of(student, objective_settings(DistillSection(method=method)))

    def gradients(pieces: int) -> tuple[float, list[Tensor]]:
        model.zero_grad()
        counts, whole = model.counts([batch]), 0.0
        for piece in batch.split(pieces):
            loss, _ = model(piece, counts)
            loss.backward()
            whole += loss.item()
        return whole, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    (loss, whole), (summed, parts) = gradients(1), gradients(pieces)
    assert summed == pytest.approx(loss, rel=1e-5)
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_new_method_is_a_declaration_and_one_small_function(student: Student, batch: Batch) -> None:
    """Tiny-NewsRec: the weights are a softmax over the teachers, and multiply the hidden loss too."""

    def softmax_of_losses(_student: Tensor, teachers: Tensor, labels: Tensor, /) -> Tensor:
        return (-teacher_cross_entropy(teachers, labels)).softmax(dim=0)

    terms = (TaskLoss(), SoftLabels(), HiddenStates(weighted=True))
    method = Method("tiny-newsrec", "Tiny-NewsRec", "arXiv 2112.00944", terms, softmax_of_losses)
    model = model_of(student, ObjectiveSettings(method))
    _, terms = total(model, batch)
    assert terms["weight/a"] + terms["weight/b"] == pytest.approx(1.0)
    assert batch.targets is not None
    weights = softmax_of_losses(torch.empty(0), batch.targets.logits, batch.labels)
    states = model.student(batch.inputs, hidden_states=True).hidden_states
    matrix = model.projections.matrices["layer2"][:3]
    errors = 0.0
    for place, position in enumerate(COVERED[0]):
        h = states[2][position // LENGTH][position % LENGTH]
        error = (matrix @ h - batch.targets.hidden[0, 2].values[place]).square().mean()
        errors += (weights[0, position // LENGTH] * error).item()
    assert terms["hidden/a/2"] == pytest.approx(errors / len(COVERED[0]) / VARIANCES[0, 2], rel=1e-5)


def test_a_batch_without_labels_and_without_covered_tokens_is_finite(student: Student, batch: Batch) -> None:
    assert batch.targets is not None
    nothing = torch.empty(0, dtype=torch.long)
    hidden = {pair: Hidden(target.values[:0], None, None, None, None, nothing) for pair, target in batch.targets.hidden.items()}
    empty = replace(batch, labels=torch.full((ROWS,), -1), targets=replace(batch.targets, hidden=hidden))
    loss, terms = total(model_of(student, objective_settings(DistillSection())), empty)
    assert math.isfinite(loss)
    assert (terms["task"], terms["hidden"]) == (0.0, 0.0)
    assert terms["weight/a"] == pytest.approx(1.0)


def test_saved_state_holds_student_and_projections(student: Student) -> None:
    names = model_of(student, objective_settings(DistillSection())).state_dict()
    assert any(name.startswith("student.network.") for name in names)
    assert any(name.startswith("projections.matrices.layer1") for name in names)
