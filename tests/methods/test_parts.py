"""Weightings, mixings, soft losses and choices of teachers against loops over rows, teachers and classes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdcache.errors import RecipeError
from kdcache.methods.base import Moment
from kdcache.methods.losses import (
    Decoupled,
    confidence,
    hard_cross_entropy,
    kl_divergence,
    low_entropy,
    majority_vote,
    mean_loss,
    softmax_of_errors,
)
from kdcache.methods.parts.schedule import (
    BestTeacher,
    SampledByStudentRank,
    SampledByTeacherRank,
    Staircase,
    rank_shares,
)
from kdcache.methods.parts.weighting import ByStudentUncertainty
from kdcache.testing.method_contract import entropy, log_softmax, plain_setup, softmax

TEACHERS, ROWS, CLASSES = 3, 5, 4
LABELS = torch.tensor([0, -1, 3, 2, -1])


@pytest.fixture
def student() -> Tensor:
    return torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def teachers() -> Tensor:
    return 2 * torch.randn(TEACHERS, ROWS, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def errors(teachers: Tensor, row: int) -> list[float]:
    label = int(LABELS[row])
    return [-log_softmax(logits)[label] if label >= 0 else 0.0 for logits in teachers[:, row].tolist()]


def test_weights_by_the_errors_of_three_teachers(student: Tensor, teachers: Tensor) -> None:
    by_softmax, by_confidence = (rule(student, teachers, LABELS) for rule in (softmax_of_errors, confidence))
    for row in range(ROWS):
        found = errors(teachers, row)
        low, high = sum(math.exp(-e) for e in found), sum(math.exp(e) for e in found)
        for i, error in enumerate(found):
            assert by_softmax[i, row].item() == pytest.approx(math.exp(-error) / low)
            assert by_confidence[i, row].item() == pytest.approx((1 - math.exp(error) / high) / (TEACHERS - 1))
    assert torch.allclose(by_softmax[:, LABELS < 0], torch.tensor(1 / TEACHERS, dtype=torch.float64))
    assert torch.allclose(by_confidence[:, LABELS < 0], torch.tensor(1 / TEACHERS, dtype=torch.float64))


def test_weights_by_the_entropy_of_three_teachers(student: Tensor, teachers: Tensor) -> None:
    weights = low_entropy(student, teachers, LABELS)
    for row in range(ROWS):
        found = [entropy(logits) for logits in teachers[:, row].tolist()]
        for i, own in enumerate(found):
            assert weights[i, row].item() == pytest.approx((1 - own / sum(found)) / (TEACHERS - 1))
    certain = 1e4 * torch.eye(CLASSES, dtype=torch.float64)[:ROWS].expand(TEACHERS, -1, -1)
    assert torch.allclose(low_entropy(certain[0], certain, LABELS), torch.tensor(1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("rule", [softmax_of_errors, confidence, low_entropy])
def test_weights_sum_to_one_and_one_teacher_has_all(rule: object, student: Tensor, teachers: Tensor) -> None:
    assert callable(rule)
    assert torch.allclose(rule(student, teachers, LABELS).sum(dim=0), torch.ones(ROWS, dtype=torch.float64))
    assert torch.allclose(rule(student, teachers[:1], LABELS), torch.ones(1, ROWS, dtype=torch.float64))


@pytest.mark.parametrize("scores", [(0.7, 0.9, 0.8), (0.9, 0.7), (0.8, 0.8, 0.9), (0.5,)])
def test_uncertain_students_learn_from_weaker_teachers(
    scores: tuple[float, ...], student: Tensor, teachers: Tensor
) -> None:
    count = len(scores)
    setup = replace(plain_setup(), validation_scores=lambda: scores)
    student = student * torch.tensor([0.0, 1.0, 5.0, 100.0, 2.0], dtype=torch.float64)[:, None]
    weights = ByStudentUncertainty().bind(setup)(student, teachers[:count], LABELS)
    for row in range(ROWS):
        u = entropy(student[row].tolist()) / math.log(CLASSES) if row != 3 else 0.0
        for i, score in enumerate(scores):
            below, ties = sum(s < score for s in scores), sum(s == score for s in scores)
            rank = (below + (ties - 1) / 2) / max(count - 1, 1)
            expected = ((1 - u) * rank + u * (1 - rank)) * 2 / count if count > 1 else 1.0
            assert weights[i, row].item() == pytest.approx(expected, abs=1e-9)
    assert torch.allclose(weights.sum(dim=0), torch.ones(ROWS, dtype=torch.float64))


def test_mean_of_the_losses_by_shares(teachers: Tensor) -> None:
    weights = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)[:, None].expand(TEACHERS, ROWS)
    targets, shares = mean_loss(teachers, weights, 1.0)
    assert targets is teachers
    assert shares[:, 0].tolist() == [0.25, 0.75, 0.0]


def test_majorities_ties_and_teachers_without_a_vote() -> None:
    logits = torch.tensor([
        [[3.0, 0.0, 0.0], [2.0, 1.0, 0.0], [2.0, 0.0, 0.0]],
        [[0.0, 1.0, 0.0], [0.0, 9.0, 0.0], [0.0, 2.0, 0.0]],
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 2.0, 0.0]],
    ])  # fmt: skip
    chosen = majority_vote(logits, torch.ones(3, 3), 1.0)[0].argmax(dim=-1)
    assert chosen.tolist() == [[1, 1, 1]]  # two of three; a tie of three, by the mean probability; two of three
    heavy = torch.tensor([[3.0], [1.0], [1.0]]).expand(3, 3)
    assert majority_vote(logits, heavy, 1.0)[0].argmax(dim=-1).tolist() == [[0, 0, 0]]
    only = torch.tensor([[0.0], [0.0], [1.0]]).expand(3, 3)
    assert majority_vote(logits, only, 1.0)[0].argmax(dim=-1).tolist() == [[1, 2, 1]]


def test_hard_labels_of_several_targets(student: Tensor, teachers: Tensor) -> None:
    losses = hard_cross_entropy(student, teachers, 5.0)
    for i in range(TEACHERS):
        for row in range(ROWS):
            label = max(range(CLASSES), key=lambda c, i=i, row=row: teachers[i, row, c].item())
            assert losses[i, row].item() == pytest.approx(-log_softmax(student[row].tolist())[label])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_decoupled_parts_and_their_sum(student: Tensor, teachers: Tensor, temperature: float) -> None:
    target_only = Decoupled(1.0, 0.0)(student, teachers, temperature, LABELS)
    others_only = Decoupled(0.0, 1.0)(student, teachers, temperature, LABELS)
    whole = kl_divergence(student, teachers, temperature)
    for i in range(TEACHERS):
        for row in range(ROWS):
            p, q = softmax(teachers[i, row].tolist(), temperature), softmax(student[row].tolist(), temperature)
            label = int(LABELS[row]) if LABELS[row] >= 0 else p.index(max(p))
            a, b = p[label], q[label]
            tckd = a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
            rest = [c for c in range(CLASSES) if c != label]
            nckd = sum(p[c] / (1 - a) * math.log((p[c] / (1 - a)) / (q[c] / (1 - b))) for c in rest)
            assert target_only[i, row].item() == pytest.approx(tckd, abs=1e-12)
            assert others_only[i, row].item() == pytest.approx(nckd, abs=1e-12)
            assert whole[i, row].item() == pytest.approx(tckd + (1 - a) * nckd, abs=1e-12)


def test_two_classes_have_no_other_classes_and_certain_teachers_no_infinity() -> None:
    student = torch.tensor([[0.3, -0.2]], requires_grad=True)
    teachers = torch.tensor([[[200.0, -200.0]]])
    losses = Decoupled(0.0, 8.0)(student, teachers, 1.0)
    assert losses.tolist() == [[0.0]]
    Decoupled()(student, teachers, 1.0).sum().backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, student.detach().softmax(dim=-1) - torch.tensor([1.0, 0.0]))


def test_ranks_share_one_and_ties_do_not_depend_on_the_order() -> None:
    assert rank_shares([0.7, 0.9, 0.8]) == pytest.approx((1 / 6, 3 / 6, 2 / 6))
    assert rank_shares([0.9, 0.7, 0.9]) == pytest.approx((2.5 / 6, 1 / 6, 2.5 / 6))
    assert rank_shares([-1.0]) == (1.0,)


def test_choices_by_the_scores_of_teachers_and_of_students() -> None:
    setup = plain_setup()  # teacher b is the better one, a has the better student
    moments = [Moment(step, seed=1) for step in range(600)]
    assert {BestTeacher().bind(setup)(moment, 2) for moment in moments} == {(0.0, 1.0)}
    by_teacher = [SampledByTeacherRank().bind(setup)(moment, 2) for moment in moments]
    by_student = [SampledByStudentRank().bind(setup)(moment, 2) for moment in moments]
    assert set(by_teacher) == set(by_student) == {(1.0, 0.0), (0.0, 1.0)}
    assert by_teacher.count((0.0, 1.0)) / 600 == pytest.approx(2 / 3, abs=0.06)
    assert by_student.count((1.0, 0.0)) / 600 == pytest.approx(2 / 3, abs=0.06)


def test_a_teacher_without_a_student_score_is_named() -> None:
    with pytest.raises(RecipeError, match=r"student_scores has no score for teacher 'b'.*: a, b") as caught:
        SampledByStudentRank().bind(replace(plain_setup(), student_scores={"a": 0.7}))
    assert "distill.teachers = [NAME]" in caught.value.hint


def test_a_staircase_rises_in_equal_steps() -> None:
    factors = [Staircase(4, end=0.5)(Moment(step, 16)) for step in range(16)]
    assert factors == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, *[1.0] * 10]
