"""Each loss against the formula written out in plain Python loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache.distill.objective import ObjectiveSettings, objective_settings
from kdcache.loading.targets import Hidden
from kdcache.methods.base import Method
from kdcache.methods.losses import (
    DistillationLoss,
    HiddenProjections,
    balanced_mean,
    each_teacher,
    inverse_cross_entropy,
    kl_divergence,
    logit_squared_error,
    mean_logit,
    mean_probability,
    mean_squared_error,
    one,
    plain_sum,
    share_of_variance,
    soft_cross_entropy,
    soft_losses,
    task_loss,
    teacher_cross_entropy,
)
from kdcache.methods.parts.soft_labels import SoftLabels, SoftLoss
from kdcache.recipe import DistillSection
from kdcache.testing.steps import loop_model, step_batch, step_loss

TEACHERS, ROWS, CLASSES = 3, 5, 4


def softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def cross_entropy(target: list[float], predicted: list[float]) -> float:
    return -sum(p * math.log(q) for p, q in zip(target, predicted, strict=True))


@pytest.fixture
def student() -> Tensor:
    return torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def teachers() -> Tensor:
    return 2 * torch.randn(TEACHERS, ROWS, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LABELS = torch.tensor([0, -1, 3, 2, -1])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("t_squared", [False, True])
def test_distillation_loss_is_equation_of_the_paper(
    student: Tensor, teachers: Tensor, temperature: float, t_squared: bool
) -> None:
    expected = 0.0
    for row in range(ROWS):
        q = softmax([value / temperature for value in student[row].tolist()])
        for teacher in range(TEACHERS):
            logits = teachers[teacher, row].tolist()
            p = softmax([value / temperature for value in logits])
            label = int(LABELS[row])
            weight = 1.0 if label < 0 else 1.0 / (1.0 - math.log(softmax(logits)[label]))
            expected += weight * cross_entropy(p, q) / ROWS
    expected *= temperature**2 if t_squared else 1.0
    loss = DistillationLoss(temperature, t_squared=t_squared)(student, teachers, LABELS)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_no_gradient_flows_through_weights_that_depend_on_the_student(student: Tensor, teachers: Tensor) -> None:
    """A weighting may look at the student's logits; its weights are constants all the same, as in a loop over rows."""

    def confidence(student_logits: Tensor, teacher_logits: Tensor, _labels: Tensor, /) -> Tensor:
        return student_logits.softmax(dim=-1).amax(dim=-1).expand(teacher_logits.shape[:2])

    student.requires_grad_()
    expected = torch.zeros_like(student)
    for row in range(ROWS):
        q = softmax(student[row].tolist())
        for teacher in range(TEACHERS):
            p = softmax(teachers[teacher, row].tolist())
            for place in range(
                CLASSES
            ):  # d CE(p, softmax(z)) / dz = softmax(z) - p, times a weight that stays as it is
                expected[row, place] += max(q) * (q[place] - p[place]) / ROWS
    DistillationLoss(weighting=confidence)(student, teachers, LABELS).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, expected, rtol=1e-12, atol=1e-14)


def test_task_loss_counts_labelled_rows_only(student: Tensor) -> None:
    rows = [row for row in range(ROWS) if LABELS[row] >= 0]
    expected = sum(-math.log(softmax(student[row].tolist())[int(LABELS[row])]) for row in rows) / len(rows)
    assert task_loss(student, LABELS).item() == pytest.approx(expected, rel=1e-12)


def test_task_loss_without_labels_is_zero_and_so_is_its_gradient(student: Tensor) -> None:
    student.requires_grad_()
    loss = task_loss(student, torch.full((ROWS,), -1))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_micro_batches_with_the_count_of_the_step_add_up(student: Tensor) -> None:
    labelled = int((LABELS >= 0).sum())
    parts = sum(task_loss(student[rows], LABELS[rows], labelled) for rows in (slice(0, 2), slice(2, 5)))
    assert torch.allclose(torch.as_tensor(parts), task_loss(student, LABELS))


def test_weights_are_one_without_label_and_below_one_with_it(student: Tensor, teachers: Tensor) -> None:
    weights = inverse_cross_entropy(student, teachers, LABELS)
    assert torch.equal(weights[:, LABELS < 0], torch.ones(TEACHERS, 2, dtype=torch.float64))
    assert bool((weights[:, LABELS >= 0] < 1).all())
    assert torch.equal(
        teacher_cross_entropy(teachers, LABELS)[:, LABELS < 0], torch.zeros(TEACHERS, 2, dtype=torch.float64)
    )


def test_mean_probability_is_the_mean_of_softened_probabilities(teachers: Tensor) -> None:
    weights = one(torch.empty(0), teachers, LABELS)
    mixed, shares = mean_probability(teachers, weights, 2.0)
    expected = (teachers / 2.0).softmax(dim=-1).mean(dim=0, keepdim=True)
    assert torch.allclose((mixed / 2.0).softmax(dim=-1), expected)
    assert torch.equal(shares, torch.ones(1, ROWS, dtype=torch.float64))


def test_mean_probability_of_unequal_weights(teachers: Tensor) -> None:
    weights = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)[:, None].expand(TEACHERS, ROWS)
    mixed, _ = mean_probability(teachers, weights, 1.0)
    probabilities = teachers.softmax(dim=-1)
    assert torch.allclose(mixed.softmax(dim=-1)[0], 0.25 * probabilities[0] + 0.75 * probabilities[1])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_losses_of_every_target_and_row(student: Tensor, teachers: Tensor, temperature: float) -> None:
    entropy = soft_cross_entropy(student, teachers, temperature)
    divergence = kl_divergence(student, teachers, temperature)
    squares = logit_squared_error(student, teachers, temperature)
    for row in range(ROWS):
        z = student[row].tolist()
        q = softmax([value / temperature for value in z])
        for teacher in range(TEACHERS):
            target = teachers[teacher, row].tolist()
            p = softmax([value / temperature for value in target])
            assert entropy[teacher, row].item() == pytest.approx(cross_entropy(p, q), rel=1e-12)
            expected = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
            assert divergence[teacher, row].item() == pytest.approx(expected, rel=1e-9)
            mean = sum((a - b) ** 2 for a, b in zip(z, target, strict=True)) / CLASSES
            assert squares[teacher, row].item() == pytest.approx(mean, rel=1e-12)


def labels_count(student: Tensor, targets: Tensor, temperature: float, labels: Tensor | None = None, /) -> Tensor:
    """A soft loss that uses the labels: the soft cross-entropy times label + 2."""
    assert labels is not None
    return soft_cross_entropy(student, targets, temperature) * (labels + 2)


def test_soft_losses_by_default_are_cross_entropies_at_temperature_one(student: Tensor, teachers: Tensor) -> None:
    weights = inverse_cross_entropy(student, teachers, LABELS)
    found = soft_losses(student, teachers, weights)
    warm = soft_losses(student, teachers, weights, temperature=2.0)
    squared = soft_losses(student, teachers, weights, temperature=2.0, t_squared=True)
    labelled = soft_losses(student, teachers, weights, soft_loss=labels_count, labels=LABELS, count=2 * ROWS)
    for teacher in range(TEACHERS):
        losses = [
            weights[teacher, row].item()
            * cross_entropy(softmax(teachers[teacher, row].tolist()), softmax(student[row].tolist()))
            for row in range(ROWS)
        ]
        assert found[teacher].item() == pytest.approx(sum(losses) / ROWS, rel=1e-12)
        known = sum((int(label) + 2) * loss for label, loss in zip(LABELS, losses, strict=True))
        assert labelled[teacher].item() == pytest.approx(known / (2 * ROWS), rel=1e-12)
    assert torch.allclose(squared, 4 * warm, rtol=1e-12)
    assert torch.equal(DistillationLoss()(student, teachers, LABELS), found.sum())
    assert torch.equal(DistillationLoss(2.0)(student, teachers, LABELS), warm.sum())


def test_soft_losses_of_no_row_are_zero_and_of_one_row_are_its_own(student: Tensor, teachers: Tensor) -> None:
    weights = torch.ones(TEACHERS, ROWS, dtype=torch.float64)
    for count in (None, 0):
        nothing = soft_losses(student[:0], teachers[:, :0], weights[:, :0], count=count)
        assert torch.equal(nothing, torch.zeros(TEACHERS, dtype=torch.float64))
    for count in (None, 1):
        alone = soft_losses(student[:1], teachers[:, :1], weights[:, :1], count=count)
        assert torch.equal(alone, soft_cross_entropy(student[:1], teachers[:, :1], 1.0)[:, 0])


@pytest.mark.parametrize("loss", [soft_cross_entropy, kl_divergence, logit_squared_error, labels_count])
def test_a_term_has_a_loss_of_its_own(loss: SoftLoss) -> None:
    """Through the module: the sum over the teachers of their mean losses, with the labels of the batch."""
    batch = step_batch()
    assert batch.targets is not None
    model = loop_model(ObjectiveSettings(Method("soft", "", "", (SoftLabels(loss),)), temperature=2.0))
    total, terms, _ = step_loss(model, batch)
    expected = loss(model.student(batch.inputs).logits, batch.targets.logits, 2.0, batch.labels).mean(dim=1)
    assert [terms["soft/a"], terms["soft/b"]] == pytest.approx(expected.tolist(), rel=1e-12)
    assert total == pytest.approx(expected.sum().item(), rel=1e-12)


@pytest.mark.parametrize("name", ["hard-labels", "annealing-kd"])
def test_losses_that_do_not_use_the_temperature_are_not_multiplied_by_its_square(name: str) -> None:
    """All teachers answer alike: the temperature would decide between classes with equally many votes."""
    batch = step_batch()
    assert batch.targets is not None
    alike = replace(batch.targets, logits=batch.targets.logits[:1].expand(2, -1, -1))

    def soft(**keys: Any) -> float:
        settings = objective_settings(DistillSection(method=name, **keys))
        return step_loss(loop_model(settings), replace(batch, targets=alike))[1]["soft"]

    assert soft(temperature=3.0, t_squared=True) == soft(temperature=3.0) == soft() != 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_means_of_teachers_are_by_shares_of_the_weights(teachers: Tensor, temperature: float) -> None:
    """Weights differ from row to row and do not sum to one; a teacher counts by its share of them on the row."""
    weights = torch.rand(TEACHERS, ROWS, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 5 + 0.1
    probability, of_probability = mean_probability(teachers, weights, temperature)
    logit, of_logit = mean_logit(teachers, weights, temperature)
    assert probability.shape == logit.shape == (1, ROWS, CLASSES)
    assert torch.equal(of_probability, torch.ones(1, ROWS, dtype=torch.float64))
    assert torch.equal(of_logit, torch.ones(1, ROWS, dtype=torch.float64))
    for row in range(ROWS):
        total = sum(weights[teacher, row].item() for teacher in range(TEACHERS))
        shares = [weights[teacher, row].item() / total for teacher in range(TEACHERS)]
        softened = [softmax([z / temperature for z in teachers[teacher, row].tolist()]) for teacher in range(TEACHERS)]
        found = softmax([z / temperature for z in probability[0, row].tolist()])
        for c in range(CLASSES):
            assert found[c] == pytest.approx(sum(s * p[c] for s, p in zip(shares, softened, strict=True)), rel=1e-12)
            mean = sum(share * teachers[teacher, row, c].item() for teacher, share in enumerate(shares))
            assert logit[0, row, c].item() == pytest.approx(mean, rel=1e-12)


def test_equal_weights_are_ones_of_the_logits_dtype(student: Tensor, teachers: Tensor) -> None:
    for dtype in (torch.float32, torch.float64):
        weights = one(student.to(dtype), teachers.to(dtype), LABELS)
        assert torch.equal(weights, torch.ones(TEACHERS, ROWS, dtype=dtype))
        assert weights.dtype == dtype


def test_each_teacher_leaves_logits_and_weights_alone(student: Tensor, teachers: Tensor) -> None:
    weights = inverse_cross_entropy(student, teachers, LABELS)
    assert each_teacher(teachers, weights, 1.0) == (teachers, weights)


def test_cross_entropy_of_equal_distributions_is_their_entropy(teachers: Tensor) -> None:
    probabilities = teachers[0].softmax(dim=-1)
    expected = -(probabilities * probabilities.log()).sum(dim=-1)
    assert torch.allclose(soft_cross_entropy(teachers[0], teachers[:1], 1.0)[0], expected)


def test_mean_squared_error_in_plain_loops() -> None:
    a, b = torch.randn(7, 3), torch.randn(7, 3)
    expected = (
        sum((x - y) ** 2 for p, q in zip(a.tolist(), b.tolist(), strict=True) for x, y in zip(p, q, strict=True)) / 21
    )
    assert mean_squared_error(a, b).item() == pytest.approx(expected, rel=1e-5)
    weights = torch.rand(7)
    weighted = sum(
        w * (x - y) ** 2
        for w, p, q in zip(weights.tolist(), a.tolist(), b.tolist(), strict=True)
        for x, y in zip(p, q, strict=True)
    )
    assert mean_squared_error(a, b, token_weights=weights).item() == pytest.approx(weighted / 21, rel=1e-5)


def test_mean_squared_error_without_a_covered_token_is_zero() -> None:
    a = torch.randn(0, 3, requires_grad=True)
    loss = mean_squared_error(a, torch.randn(0, 3))
    loss.backward()
    assert loss.item() == 0.0


def test_reductions() -> None:
    losses = {(0, 1): torch.tensor(2.0), (1, 1): torch.tensor(6.0)}
    shares = share_of_variance(losses, {(0, 1): 2.0, (1, 1): 3.0})
    assert plain_sum(losses).item() == 8.0
    assert balanced_mean(shares).item() == 1.5
    assert share_of_variance({(0, 1): torch.tensor(0.0)}, {(0, 1): 0.0})[0, 1].item() == 0.0


BATCH, LENGTH, WIDTH = 2, 4, 6
DIMS = {(0, 1): 3, (0, 2): 3, (1, 1): 5, (1, 2): 5}
POSITIONS = {0: [0, 1, 2, 4, 5], 1: [0, 2, 3, 4]}


def hidden_targets() -> dict[tuple[int, int], Hidden]:
    def target(teacher: int, dim: int) -> Hidden:
        positions = torch.tensor(POSITIONS[teacher])
        return Hidden(torch.randn(len(positions), dim), None, None, None, None, positions)

    return {pair: target(pair[0], dim) for pair, dim in DIMS.items()}


def test_student_to_teacher_projects_the_student_with_one_matrix_per_pair() -> None:
    torch.manual_seed(0)
    states, targets = [torch.randn(BATCH, LENGTH, WIDTH) for _ in range(3)], hidden_targets()
    projections = HiddenProjections(DIMS, WIDTH, "student-to-teacher", seed=3)
    assert sorted(tuple(matrix.shape) for matrix in projections.parameters()) == [(8, WIDTH), (8, WIDTH)]
    with torch.no_grad():
        for matrix in projections.parameters():
            matrix.normal_()  # they start at zero
    sides = projections(states, targets)
    assert set(sides) == set(DIMS)
    for (teacher, layer), (student, target) in sides.items():
        rows = slice(0, 3) if teacher == 0 else slice(3, 8)
        matrix = projections.matrices[f"layer{layer}"][rows]
        for place, position in enumerate(POSITIONS[teacher]):
            token = states[layer][position // LENGTH, position % LENGTH]
            assert torch.allclose(student[place], matrix @ token, atol=1e-6)
        assert torch.equal(target, targets[teacher, layer].values)


def test_teacher_to_student_projects_the_teacher() -> None:
    torch.manual_seed(0)
    states, targets = [torch.randn(BATCH, LENGTH, WIDTH) for _ in range(3)], hidden_targets()
    projections = HiddenProjections(DIMS, WIDTH, "teacher-to-student", seed=3)
    for (teacher, layer), (student, target) in projections(states, targets).items():
        matrix = projections.matrices[f"layer{layer}-teacher{teacher}"]
        assert matrix.shape == (WIDTH, DIMS[teacher, layer])
        assert torch.equal(student, states[layer].flatten(0, 1)[POSITIONS[teacher]])
        assert torch.allclose(target, targets[teacher, layer].values @ matrix.T, atol=1e-6)


def test_projections_of_the_teachers_are_seeded() -> None:
    first, again, other = (HiddenProjections(DIMS, WIDTH, "teacher-to-student", seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_a_student_that_says_nothing_yet_costs_the_variance_of_its_target_and_pulls_at_w_alone() -> None:
    torch.manual_seed(0)
    states = [torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True) for _ in range(3)]
    projections = HiddenProjections(DIMS, WIDTH, "student-to-teacher")
    sides = projections(states, hidden_targets())
    losses = {pair: mean_squared_error(*both) for pair, both in sides.items()}
    for pair, (_, target) in sides.items():
        assert losses[pair].item() == pytest.approx(target.square().mean().item())
    plain_sum(losses).backward()
    assert all(matrix.grad is not None and matrix.grad.abs().sum() > 0 for matrix in projections.parameters())
    assert all(state.grad is None or not state.grad.any() for state in states)
