"""The slot D: losses between the soft labels of student and teachers, and the term that sums them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.methods.base import Moment, Needs, Owned, Pair, Scope, Setup, View, Weight
from kdcache.methods.parts.mixing import Mixing, each_teacher
from kdcache.methods.parts.weighting import Weighting, inverse_cross_entropy, teacher_weights

if TYPE_CHECKING:
    from kdcache.loading.targets import Batch


class SoftLoss(Protocol):
    """D: a loss for every target and row."""

    def __call__(
        self, student_logits: Tensor, target_logits: Tensor, temperature: float, labels: Tensor | None = None, /
    ) -> Tensor:
        """A loss ``[targets, batch]``.

        Shapes: student_logits ``[batch, classes]``, target_logits ``[targets, batch, classes]``, labels ``[batch]``,
        -1 = none.
        """
        ...


def soft_cross_entropy(
    student_logits: Tensor, target_logits: Tensor, temperature: float, _labels: Tensor | None = None, /
) -> Tensor:
    """CE(softmax(z_i/T), softmax(z_s/T)) of every target and row.

    Args:
        student_logits: ``[batch, classes]``.
        target_logits: ``[targets, batch, classes]``.
        temperature: T, above 0.

    Returns:
        Losses ``[targets, batch]``.
    """
    target = F.softmax(target_logits / temperature, dim=-1)
    return -(target * F.log_softmax(student_logits / temperature, dim=-1)).sum(dim=-1)


def kl_divergence(
    student_logits: Tensor, target_logits: Tensor, temperature: float, _labels: Tensor | None = None, /
) -> Tensor:
    """KL(softmax(z_i/T) || softmax(z_s/T)): ``soft_cross_entropy`` minus the target's entropy; the same gradient."""
    target = F.log_softmax(target_logits / temperature, dim=-1)
    return (target.exp() * (target - F.log_softmax(student_logits / temperature, dim=-1))).sum(dim=-1)


def logit_squared_error(
    student_logits: Tensor, target_logits: Tensor, _temperature: float, _labels: Tensor | None = None, /
) -> Tensor:
    """Mean over the classes of (z_s - z_i)²; the temperature is not used. Shapes as in ``soft_cross_entropy``."""
    return (student_logits - target_logits).square().mean(dim=-1)


def hard_cross_entropy(
    student_logits: Tensor, target_logits: Tensor, _temperature: float, _labels: Tensor | None = None, /
) -> Tensor:
    """CE(argmax z_i, z_s): the target's most probable class as a label; the temperature is not used."""
    targets, classes = target_logits.argmax(dim=-1), student_logits.shape[-1]
    losses = F.cross_entropy(
        student_logits.expand(len(targets), -1, -1).reshape(-1, classes), targets.flatten(), reduction="none"
    )
    return losses.reshape(targets.shape)


@dataclass(frozen=True)
class Decoupled:
    """alpha * TCKD + beta * NCKD (decoupled KD, arXiv 2203.08679, section 3).

    TCKD is the KL divergence between the probabilities of the target class and of all others together. NCKD is the KL
    divergence within the other classes. KL = TCKD + (1 - p) * NCKD, where p is the target's probability of its class.

    The target class is the gold label; on rows without one it is the target's most probable class. With two classes
    there is only one other class, and NCKD is 0.
    """

    alpha: float = 1.0
    beta: float = 8.0

    def __call__(
        self, student_logits: Tensor, target_logits: Tensor, temperature: float, labels: Tensor | None = None, /
    ) -> Tensor:
        """A loss ``[targets, batch]``; shapes as in ``soft_cross_entropy``."""
        predicted = target_logits.argmax(dim=-1)
        classes = predicted if labels is None else torch.where(labels >= 0, labels, predicted)
        is_target = F.one_hot(classes, target_logits.shape[-1]).bool()
        teacher = F.log_softmax(target_logits / temperature, dim=-1)
        student = F.log_softmax(student_logits / temperature, dim=-1).expand_as(teacher)
        binary = _divergence(_two_way(teacher, is_target), _two_way(student, is_target))
        others = _divergence(_among_others(teacher, is_target), _among_others(student, is_target))
        return self.alpha * binary + self.beta * others


def _two_way(log_probabilities: Tensor, is_target: Tensor) -> Tensor:
    """Logs of (probability of the target class, probability of all others), ``[..., 2]``."""
    sides = (log_probabilities.masked_fill(~chosen, -torch.inf).logsumexp(dim=-1) for chosen in (is_target, ~is_target))
    return torch.stack(list(sides), dim=-1)


def _among_others(log_probabilities: Tensor, is_target: Tensor) -> Tensor:
    """Logs of the probabilities within the other classes; 0 for the target class, which adds 0 to a divergence."""
    return F.log_softmax(log_probabilities.masked_fill(is_target, -torch.inf), dim=-1).masked_fill(is_target, 0.0)


def _divergence(target: Tensor, student: Tensor) -> Tensor:
    """KL of log-probabilities."""
    return (target.exp() * (target - student)).sum(dim=-1)


def soft_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    t_squared: bool = False,
    mixing: Mixing = each_teacher,
    soft_loss: SoftLoss = soft_cross_entropy,
    labels: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """Weighted soft-label losses, one for each target that ``mixing`` makes of the teachers.

    Args:
        student_logits: ``[batch, classes]``.
        teacher_logits: ``[teachers, batch, classes]``.
        weights: ``[teachers, batch]``, constants.
        temperature: T, above 0.
        t_squared: Multiply by T².
        mixing: How the teachers' soft labels become targets.
        soft_loss: The loss between a target and the student.
        labels: ``[batch]``, -1 = none; for losses that use them.
        count: Rows of the whole step; by default those of the batch.

    Returns:
        ``[targets]``: sums over the rows divided by ``count``.
    """
    targets, shares = mixing(teacher_logits, weights, temperature)
    losses = soft_loss(student_logits, targets, temperature, labels) * shares
    factor = temperature**2 if t_squared else 1.0
    return factor * losses.sum(dim=1) / max(losses.shape[1] if count is None else count, 1)


class DistillationLoss(nn.Module):
    """L_dis = sum_i CE(softmax(z_i/T), softmax(z_s/T)) / (1 + CE(y, softmax(z_i))), the mean over the rows.

    MT-BERT (arXiv 2106.01023), section 3.2. Rows without a gold label have weight 1. The weights are constants: no
    gradient flows through ``weighting``. ``kdcache distill`` computes its soft term with the same functions.

    Args:
        temperature: T, above 0.
        t_squared: Multiply by T²; the paper does not.
        weighting: The weight of each teacher on each row.
    """

    def __init__(
        self, temperature: float = 1.0, *, t_squared: bool = False, weighting: Weighting = inverse_cross_entropy
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.t_squared = t_squared
        self.weighting = weighting

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            student_logits: ``[batch, classes]``.
            teacher_logits: ``[teachers, batch, classes]``.
            labels: ``[batch]``, -1 = none.

        Returns:
            A scalar.
        """
        weights = teacher_weights(self.weighting, student_logits, teacher_logits, labels)
        losses = soft_losses(
            student_logits, teacher_logits, weights, temperature=self.temperature, t_squared=self.t_squared
        )
        return losses.sum()


@dataclass(frozen=True)
class SoftLabels:
    """The term: the teachers' soft labels, mixed and weighted; temperature and T² come from the recipe.

    Attributes:
        loss: D.
        mixing: M.
        target_scale: The teachers' logits are multiplied by it; None leaves them as they are.
        reads_labels: Whether ``loss`` uses gold labels.
        softened: Whether ``loss`` divides logits by the temperature. T² makes up for that, so a loss that does not is
            never multiplied by it.
    """

    loss: SoftLoss = soft_cross_entropy
    mixing: Mixing = each_teacher
    target_scale: Callable[[Moment], float] | None = None
    reads_labels: bool = False
    softened: bool = True
    name: str = "soft"
    weight: Weight = "soft"
    scope: Scope = "row"
    weighted: bool = True

    @property
    def needs(self) -> Needs:
        return Needs(logits=True, labels=self.reads_labels)

    def bind(self, setup: Setup, /) -> BoundSoftLabels:
        """With temperature and T² of the setup."""
        return BoundSoftLabels(self, setup)


class BoundSoftLabels:
    """The bound term, without parameters. Logs the loss of each teacher if every teacher is a target."""

    owned: Mapping[str, Owned] = {}

    def __init__(self, term: SoftLabels, setup: Setup) -> None:
        self._term, self._setup = term, setup

    def count(self, _batch: Batch, /) -> Mapping[Pair, int]:
        return {}

    def __call__(self, view: View, log: dict[str, Tensor], /) -> Tensor:
        scale = self._term.target_scale
        losses = soft_losses(
            view.student_logits,
            view.teacher_logits if scale is None else scale(view.moment) * view.teacher_logits,
            view.weights,
            temperature=self._setup.temperature,
            t_squared=self._setup.t_squared and self._term.softened,
            mixing=self._term.mixing,
            soft_loss=self._term.loss,
            labels=view.labels,
            count=view.counts.rows,
        )
        if len(losses) == len(self._setup.teachers):
            log |= {f"{self._term.name}/{name}": loss for name, loss in zip(self._setup.teachers, losses, strict=True)}
        return losses.sum()
