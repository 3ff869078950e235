"""The loss terms of distillation as plain functions and modules: tensors and numbers in, tensors out.

They know neither recipes nor caches, so a training loop of one's own can use them as they are::

    soft = losses.DistillationLoss(temperature=2.0)
    loss = losses.task_loss(logits, labels) + soft(logits, teacher_logits, labels)

Every term is a sum over rows or tokens divided by a count. The count defaults to that of the given batch; where a step is
cut into micro-batches, give the count of the whole step, and the micro-batches' losses add up to that of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.distill.mixing import Mixing, each_teacher
from kdcache.distill.weighting import Weighting, inverse_cross_entropy

if TYPE_CHECKING:
    from kdcache.distill.targets import Hidden

Direction = Literal["student-to-teacher", "teacher-to-student"]
Pair = tuple[int, int]  # (teacher index, student layer), as in Targets.hidden
_TINY_VARIANCE = 1e-8  # a constant target has nothing to teach; it must not divide by zero either


def task_loss(student_logits: Tensor, labels: Tensor, count: int | None = None) -> Tensor:
    """CE(y, z_s) averaged over the labelled rows (label >= 0); 0, with a gradient of 0, where there is none.

    Shapes: student_logits [batch, classes], labels [batch]. ``count``: labelled rows of the whole step.
    """
    labelled = int((labels >= 0).sum()) if count is None else count
    summed = F.cross_entropy(student_logits, labels, ignore_index=-1, reduction="sum")
    return summed / max(labelled, 1)


class SoftLoss(Protocol):
    """D of the design: a loss per target and row, [targets, batch]."""

    def __call__(self, student_logits: Tensor, target_logits: Tensor, temperature: float, /) -> Tensor:
        """Shapes: student_logits [batch, classes], target_logits [targets, batch, classes]."""
        ...


def soft_cross_entropy(student_logits: Tensor, target_logits: Tensor, temperature: float, /) -> Tensor:
    """CE(softmax(z_i/T), softmax(z_s/T)) of every target and row, [targets, batch]."""
    target = F.softmax(target_logits / temperature, dim=-1)
    return -(target * F.log_softmax(student_logits / temperature, dim=-1)).sum(dim=-1)


def teacher_weights(weighting: Weighting, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """w_i(x) of a weighting, [teachers, batch], as constants: no gradient flows through them, also where the student is weighed.

    Shapes: student_logits [batch, classes], teacher_logits [teachers, batch, classes], labels [batch], -1 = none.
    """
    with torch.no_grad():
        return weighting(student_logits, teacher_logits, labels)


def soft_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    t_squared: bool = False,
    mixing: Mixing = each_teacher,
    soft_loss: SoftLoss = soft_cross_entropy,
    count: int | None = None,
) -> Tensor:
    """Weighted soft-label losses, one for each target that ``mixing`` makes of the teachers: summed over rows, divided by ``count``.

    Shapes: student_logits [batch, classes], teacher_logits [teachers, batch, classes], weights [teachers, batch]; gives [targets].
    ``count``: rows of the whole step.
    """
    targets, shares = mixing(teacher_logits, weights, temperature)
    losses = soft_loss(student_logits, targets, temperature) * shares
    factor = temperature**2 if t_squared else 1.0
    return factor * losses.sum(dim=1) / max(losses.shape[1] if count is None else count, 1)


class DistillationLoss(nn.Module):
    """L_dis = sum_i CE(softmax(z_i/T), softmax(z_s/T)) / (1 + CE(y, softmax(z_i))), per row, then the mean over the rows.

    MT-BERT, section 3.2. Rows without a gold label weigh 1. The paper has no factor T²; ``t_squared`` multiplies it in. The weights
    are constants: no gradient flows through ``weighting``. ``kdcache distill`` computes its soft term with the same functions.
    """

    def __init__(
        self, temperature: float = 1.0, *, t_squared: bool = False, weighting: Weighting = inverse_cross_entropy
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.t_squared = t_squared
        self.weighting = weighting

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Shapes: student_logits [batch, classes], teacher_logits [teachers, batch, classes], labels [batch], -1 = none."""
        weights = teacher_weights(self.weighting, student_logits, teacher_logits, labels)
        losses = soft_losses(student_logits, teacher_logits, weights, temperature=self.temperature, t_squared=self.t_squared)
        return losses.sum()


class HiddenProjections(nn.Module):
    """W_ij, one learnable matrix per teacher and student layer, thrown away after training (MT-BERT, section 3.2).

    ``dims``: (teacher index, student layer) -> dim of the stored target. ``width``: hidden size of the student.
    student-to-teacher keeps the teachers' matrices of one student layer as blocks of a single [sum of dims, width] matrix:
    one product instead of N. teacher-to-student keeps one [width, dim] matrix per pair. No bias, as in the paper.

    On the student's side W starts at zero: the student says nothing yet, the loss starts at the variance of its target, and W learns
    before the student is pulled. Started at random it predicts noise, which costs many times that variance, and the student
    pays for it (docs/results.md). On the teacher's side zero is the collapse itself, so W starts at random, by ``seed``.
    """

    def __init__(self, dims: dict[Pair, int], width: int, direction: Direction, *, seed: int = 0) -> None:
        super().__init__()
        self.direction = direction
        self.dims = dict(sorted(dims.items(), key=lambda item: (item[0][1], item[0][0])))
        generator = torch.Generator().manual_seed(seed)
        self.matrices = nn.ParameterDict()
        for pair, dim in self.dims.items():
            if direction == "student-to-teacher":
                block = torch.zeros(dim, width)
            else:
                block = torch.randn((width, dim), generator=generator) / dim**0.5
            name = self._name(pair)
            known = [self.matrices[name].data] if name in self.matrices else []
            self.matrices[name] = nn.Parameter(torch.cat([*known, block]))

    def _name(self, pair: Pair) -> str:
        teacher, layer = pair
        return f"layer{layer}" if self.direction == "student-to-teacher" else f"layer{layer}-teacher{teacher}"

    def forward(self, student_hidden: Sequence[Tensor], targets: dict[Pair, Hidden]) -> dict[Pair, tuple[Tensor, Tensor]]:
        """(student side, teacher side) of every pair, both [covered tokens, dim or width].

        ``student_hidden``: hidden states [batch, tokens, width] indexed by layer, 0 = embeddings.
        """
        if self.direction == "teacher-to-student":
            return {pair: self._towards_student(student_hidden, pair, target) for pair, target in targets.items()}
        sides: dict[Pair, tuple[Tensor, Tensor]] = {}
        for layer in sorted({layer for _, layer in targets}):
            states, matrix = student_hidden[layer].flatten(0, 1), self.matrices[f"layer{layer}"]
            blocks = [pair for pair in self.dims if pair[1] == layer]
            sizes = [self.dims[pair] for pair in blocks]
            if any(targets[pair].count < len(states) // 2 for pair in blocks if pair in targets):  # targets per text
                pieces = dict(zip(blocks, matrix.split(sizes), strict=True))
                sided = {pair: F.linear(targets[pair].of_student(states), pieces[pair]) for pair in blocks if pair in targets}
            else:
                projected = dict(zip(blocks, F.linear(states, matrix).split(sizes, dim=1), strict=True))
                sided = {pair: targets[pair].of_student(projected[pair]) for pair in blocks if pair in targets}
            sides |= {pair: (side, targets[pair].aligned()) for pair, side in sided.items()}
        return sides

    def _towards_student(self, student_hidden: Sequence[Tensor], pair: Pair, target: Hidden) -> tuple[Tensor, Tensor]:
        student = target.of_student(student_hidden[pair[1]].flatten(0, 1))
        return student, F.linear(target.aligned(), self.matrices[self._name(pair)])


def mean_squared_error(
    student: Tensor, teacher: Tensor, *, token_weights: Tensor | None = None, count: int | None = None
) -> Tensor:
    """MSE over tokens and dimensions, [tokens, dim] each; 0, with a gradient of 0, where no token is covered.

    ``token_weights`` [tokens] multiply each token's error. ``count``: covered tokens of the whole step.
    """
    count = max(len(student) if count is None else count, 1)
    if token_weights is None:  # one kernel each way
        return F.mse_loss(student.float(), teacher.float(), reduction="sum") / (count * student.shape[1])
    errors = (student.float() - teacher.float()).square().mean(dim=-1)
    return (errors * token_weights).sum() / count


def share_of_variance(losses: Mapping[Pair, Tensor], variances: Mapping[Pair, float]) -> dict[Pair, Tensor]:
    """Each pair's MSE divided by the variance of its target: about 1 for a student that says nothing about it."""
    return {pair: loss / max(variances[pair], _TINY_VARIANCE) for pair, loss in losses.items()}


def plain_sum(losses: Mapping[Pair, Tensor]) -> Tensor:
    """The paper's reduction, L_hid = sum_i sum_j MSE: grows with teachers and layers."""
    return torch.stack(list(losses.values())).sum()


def balanced_mean(losses: Mapping[Pair, Tensor]) -> Tensor:
    """The mean over teachers and layers, so that the term's scale does not depend on how many there are."""
    return torch.stack(list(losses.values())).mean()
