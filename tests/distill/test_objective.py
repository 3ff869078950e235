"""The total loss: its terms against loops written out, micro-batches, presets, and a new method as one row."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.distill.mixture import Mixture
from kdcache.distill.objective import DistillationModel, ObjectiveSettings, objective_settings
from kdcache.distill.teacher_weights import WeightedTeachers
from kdcache.errors import RecipeError
from kdcache.loading.targets import Batch, Hidden, Targets
from kdcache.methods.base import Method, Moment
from kdcache.methods.parts.hidden_states import HiddenStates
from kdcache.methods.parts.layer_map import EVEN, LAST, RANDOM
from kdcache.methods.parts.schedule import Stages
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss
from kdcache.methods.parts.weighting import teacher_cross_entropy
from kdcache.recipe import DistillSection, StudentSection, WeightsSection
from kdcache.students.build import build_student
from kdcache.students.model import Student, StudentModel
from kdcache.testing.steps import LoopStudent, loop_model, step_batch, step_loss
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
    return DistillationModel(
        student.model, settings, TEACHERS, dims=dims, variances=lambda _epoch: VARIANCES, seed=0
    ).train()


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


def mt_bert_in_loops(model: DistillationModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The paper's loss of a whole step: row by row, teacher by teacher, token by token, coordinate by coordinate."""
    assert batch.targets is not None
    settings = model.settings
    temperature = settings.temperature
    output = model.student(batch.inputs, hidden_states=True)
    labelled = [row for row in range(ROWS) if batch.labels[row] >= 0]
    task, soft, hidden = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for row in range(ROWS):
        q = output.logits[row].softmax(dim=0)
        softened = (output.logits[row] / temperature).softmax(dim=0)
        label = int(batch.labels[row])
        if label >= 0:
            task = task - q[label].log() / (ROWS if settings.task_over_rows else len(labelled))
        for teacher in range(len(TEACHERS)):
            logits = batch.targets.logits[teacher, row]
            weight = 1.0 if label < 0 else 1.0 / (1.0 - float(logits.softmax(dim=0)[label].log()))
            p = (logits / temperature).softmax(dim=0)
            for place in range(CLASSES):
                soft = soft - weight * p[place] * softened[place].log() / ROWS
    if settings.t_squared:
        soft = temperature**2 * soft
    if settings.needs_hidden:
        for (teacher, layer), target in batch.targets.hidden.items():
            mse = torch.zeros((), dtype=torch.float64)
            for place, position in enumerate(target.positions.tolist()):
                state, told = output.hidden_states[layer][position // LENGTH][position % LENGTH], target.values[place]
                if settings.direction == "student-to-teacher":
                    first = 0 if teacher == 0 else DIMS[0, layer]
                    matrix = model.projections.matrices[f"layer{layer}"][first : first + DIMS[teacher, layer]]
                    state = matrix.double() @ state
                else:
                    told = model.projections.matrices[f"layer{layer}-teacher{teacher}"].double() @ told.double()
                for mine, theirs in zip(state, told, strict=True):
                    mse = mse + (mine - theirs) ** 2 / (len(state) * len(target.positions))
            hidden = hidden + (mse / VARIANCES[teacher, layer] / len(DIMS) if not settings.paper else mse)
    loss = settings.task * task + settings.soft * soft + settings.hidden * hidden
    return loss, {"task": task, "soft": soft, "hidden": hidden}


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize(
    "section",
    [
        DistillSection(),
        DistillSection(paper=True),
        DistillSection(hidden_direction="teacher-to-student"),
        DistillSection(task_mean="rows"),
        DistillSection(temperature=2.0, t_squared=True, weights=WeightsSection(task=0.5, soft=2.0, hidden=0.0)),
    ],
    ids=["default", "paper", "teachers projected", "task over all rows", "no hidden"],
)
def test_the_module_trains_on_the_loss_of_mt_bert(batch: Batch, section: DistillSection, pieces: int) -> None:
    """Loss, terms and gradients of a step, through forward and backward of its micro-batches, some rows of it without a
    label.
    """
    settings = objective_settings(section)
    assert batch.targets is not None
    batch = replace(batch, targets=replace(batch.targets, logits=batch.targets.logits.double()))
    student = cast("StudentModel", LoopStudent(CLASSES))
    dims = DIMS if settings.needs_hidden else {}
    model = DistillationModel(
        student, settings, TEACHERS, dims=dims, variances=lambda _epoch: VARIANCES, seed=0
    ).train()
    generator = torch.Generator().manual_seed(6)
    if settings.needs_hidden and settings.direction == "student-to-teacher":
        model.projections.double()
    for matrix in model.projections.parameters() if settings.needs_hidden else ():
        matrix.data.normal_(generator=generator)  # those on the student's side start at zero
    expected, expected_terms = mt_bert_in_loops(model, batch)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    counts, found, terms = model.counts([batch]), 0.0, {}
    for piece in batch.split(pieces):
        loss, parts = model(piece, counts)
        loss.backward()
        found += loss.item()
        terms = {name: terms.get(name, 0.0) + value.item() for name, value in parts.items()}
    exact = 1e-5 if settings.needs_hidden else 1e-12  # the hidden loss is computed in float32, all else is float64 here
    assert found == pytest.approx(expected.item(), rel=exact)
    assert terms["task"] == pytest.approx(expected_terms["task"].item(), rel=1e-12)
    assert terms["soft"] == pytest.approx(expected_terms["soft"].item(), rel=1e-12)
    assert terms.get("hidden", 0.0) == pytest.approx(expected_terms["hidden"].item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        wanted = gradients[name]
        assert wanted is not None, name
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, wanted, rtol=exact, atol=10 * exact * float(wanted.abs().max())), name


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
def test_micro_batches_give_the_loss_and_gradient_of_the_step(
    student: Student, batch: Batch, method: str, pieces: int
) -> None:
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
    hidden = {
        pair: Hidden(target.values[:0], None, None, None, None, nothing)
        for pair, target in batch.targets.hidden.items()
    }
    empty = replace(batch, labels=torch.full((ROWS,), -1), targets=replace(batch.targets, hidden=hidden))
    loss, terms = total(model_of(student, objective_settings(DistillSection())), empty)
    assert math.isfinite(loss)
    assert (terms["task"], terms["hidden"]) == (0.0, 0.0)
    assert terms["weight/a"] == pytest.approx(1.0)


def test_saved_state_holds_student_and_projections(student: Student) -> None:
    names = model_of(student, objective_settings(DistillSection())).state_dict()
    assert any(name.startswith("student.network.") for name in names)
    assert any(name.startswith("projections.matrices.layer1") for name in names)


@pytest.mark.parametrize("paper", [False, True])
def test_the_recipe_chooses_the_layer_map_and_the_side_of_w(paper: bool) -> None:
    assert objective_settings(DistillSection(paper=paper)).layer_map is EVEN
    for name, mapping in (("even", EVEN), ("last", LAST), ("random", RANDOM)):
        assert objective_settings(DistillSection(paper=paper, layer_map=name)).layer_map is mapping
    section = DistillSection(paper=paper, hidden_direction="both")
    assert objective_settings(section).direction == ("teacher-to-student" if paper else "both")


@pytest.mark.parametrize("accumulation", [2, 3])
def test_micro_batches_are_for_methods_that_take_rows_alone(accumulation: int) -> None:
    assert objective_settings(DistillSection(accumulation=accumulation)).method.name == "mt-bert"
    assert objective_settings(DistillSection(method="rkd", accumulation=1)).method.name == "rkd"
    with pytest.raises(RecipeError, match=rf"distill\.accumulation = {accumulation} cuts batches") as caught:
        objective_settings(DistillSection(method="rkd", accumulation=accumulation))
    assert caught.value.hint == "Set distill.accumulation = 1, with a smaller distill.batch_size where memory is short."


def test_a_layer_map_beside_that_of_the_method_is_refused_with_a_hint() -> None:
    assert objective_settings(DistillSection(method="rkd", layer_map="last")).layer_map is LAST
    with pytest.raises(RecipeError, match=r"is 'random', but method 'rkd' has its own: last") as caught:
        objective_settings(DistillSection(method="rkd", layer_map="random"))
    assert caught.value.hint == "Leave distill.layer_map out, or choose layers with distill.teacher_layers."


def test_the_seed_decides_the_first_values_of_w() -> None:
    settings = objective_settings(DistillSection(hidden_direction="teacher-to-student"))

    def first(**seed: int) -> Tensor:
        student = cast("StudentModel", LoopStudent(CLASSES))
        model = DistillationModel(student, settings, TEACHERS, dims=DIMS, variances=lambda _epoch: VARIANCES, **seed)
        return torch.cat([matrix.detach().flatten() for matrix in model.projections.parameters()])

    assert torch.equal(first(seed=3), first(seed=3))
    assert torch.equal(first(), first(seed=0))
    assert not torch.equal(first(seed=0), first(seed=3))
    assert not torch.equal(first(seed=0), first(seed=1))


def test_the_modules_of_all_terms_are_trained() -> None:
    terms = (HiddenStates(), HiddenStates("first", name="first", module="of-the-first"))
    model = loop_model(ObjectiveSettings(Method("two", "", "", terms)))
    assert set(model.owned) == {"projections", "of-the-first"}
    _, _, gradients = step_loss(model, step_batch())
    assert {name.split(".")[0] for name in gradients} == {"student", "projections", "of-the-first"}


def test_counts_of_a_step_are_those_of_its_micro_batches_together() -> None:
    model, batch = loop_model(objective_settings(DistillSection())), step_batch()
    assert batch.targets is not None
    pieces = batch.split(3)
    expected = {pair: len(target.positions) for pair, target in batch.targets.hidden.items()}
    assert len({*expected.values()}) == 2  # another number for every teacher
    for counts in (model.counts([batch]), model.counts(pieces)):
        assert (counts.rows, counts.labelled) == (6, 4)
        assert counts.vectors["hidden"] == expected


def test_terms_without_targets_are_left_out_and_those_after_them_are_not() -> None:
    method = Method("soft-first", "", "", (SoftLabels(), TaskLoss()))
    loss, terms, _ = step_loss(loop_model(ObjectiveSettings(method)), replace(step_batch(), targets=None))
    assert set(terms) == {"task"}
    assert loss == terms["task"] > 0


def test_a_step_without_any_term_has_no_loss_and_no_gradient() -> None:
    stages = Stages(((0.5, ("hidden",)), (1.0, ("soft",))))
    method = Method("stages", "", "", (SoftLabels(),), schedule=stages)
    for batch, moment in ((step_batch(), Moment(0, 10)), (replace(step_batch(), targets=None), Moment(9, 10))):
        loss, terms, gradients = step_loss(loop_model(ObjectiveSettings(method)), batch, moment=moment)
        assert loss == 0.0
        assert "soft" not in terms
        assert gradients
        assert all(not gradient.any() for gradient in gradients.values())


def weighted(student: Student, method: str, mixture: Mixture | None) -> DistillationModel:
    settings = objective_settings(DistillSection(method=method))
    dims = DIMS if settings.needs_hidden else {}
    own = None if mixture is None else WeightedTeachers(mixture)
    variances = dict.fromkeys(DIMS, 1.0)
    return DistillationModel(
        student.model, settings, TEACHERS, dims=dims, variances=lambda _: variances, weighted=own
    ).train()


@pytest.mark.parametrize("method", ["mt-bert", "kd"])
def test_equal_weights_change_nothing(student: Student, batch: Batch, method: str) -> None:
    plain = total(weighted(student, method, None), batch, pieces=2)
    assert total(weighted(student, method, Mixture(np.array([0.5, 0.5]), np.ones(2))), batch, pieces=2) == plain
    settings = weighted(student, method, Mixture(np.array([0.5, 0.5]), np.ones(2)))
    assert settings.state_dict().keys() == weighted(student, method, None).state_dict().keys()


def test_a_row_whose_only_teacher_has_no_weight_for_its_class_counts(student: Student, batch: Batch) -> None:
    """One teacher is chosen, and its weight is 0 on the rows where it predicts a class: they have its target."""
    split = Mixture(np.array([0.5, 0.5]), np.ones(2), np.array([[0.0, 1.0], [1.0, 0.0]]))
    model = weighted(student, "kd", split)
    model._choice = lambda _moment, _count: (1.0, 0.0)
    alone = weighted(student, "kd", None)
    alone._choice = model._choice
    assert total(model, batch)[1]["soft"] == pytest.approx(total(alone, batch)[1]["soft"], rel=1e-6)


BY_CLASS = np.array([[0.9, 0.25], [0.1, 0.75]])


@pytest.mark.parametrize("classes", [None, BY_CLASS])
def test_weights_and_temperatures_against_loops(student: Student, batch: Batch, classes: np.ndarray | None) -> None:
    """mt-bert: N w_i times the weight of the row; kd: the mean by w_i; on rows with a label and without."""
    assert batch.targets is not None
    shares, hot = np.array([0.7, 0.3]), (2.0, 0.5)
    mixture = Mixture(shares, np.array(hot), classes)
    model = weighted(student, "mt-bert", mixture)
    student_logits = model.student(batch.inputs).logits.detach()
    soft = mean = 0.0
    for row, label in enumerate(batch.labels.tolist()):
        each = [(batch.targets.logits[i, row] / hot[i]).softmax(0) for i in range(2)]
        predicted = int((shares[0] * each[0] + shares[1] * each[1]).argmax())
        own = shares if classes is None else classes[:, predicted]
        log_student = student_logits[row].log_softmax(0)
        for index, probabilities in enumerate(each):
            doubt = 1.0 if label < 0 else 1 / (1 - math.log(float(probabilities[label])))
            cross_entropy = -float((probabilities * log_student).sum())
            soft += 2 * own[index] * doubt * cross_entropy / ROWS
            mean += own[index] * cross_entropy / ROWS
    _, terms = total(model, batch)
    assert terms["soft"] == pytest.approx(soft, rel=1e-5)
    assert total(weighted(student, "kd", mixture), batch, pieces=2)[1]["soft"] == pytest.approx(mean, rel=1e-5)
    mse = hidden_in_loops(model, batch)
    expected = sum(2 * shares[teacher] * loss for (teacher, _), loss in mse.items()) / 4
    assert terms["hidden"] == pytest.approx(expected, rel=1e-5)


def test_a_hidden_loss_that_is_weighted_by_row_counts_the_weight_of_a_teacher_once(
    student: Student, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.distill import objective

    method = Method("own", "", "", (TaskLoss(), HiddenStates(weighted=True)))
    monkeypatch.setattr(objective, "find_method", lambda _: method)
    model = weighted(student, "own", Mixture(np.array([0.7, 0.3]), np.ones(2)))
    _, terms = total(model, batch)
    mse = hidden_in_loops(model, batch)
    expected = sum((1.4, 0.6)[teacher] * loss for (teacher, _), loss in mse.items()) / 4
    assert terms["hidden"] == pytest.approx(expected, rel=1e-5)
