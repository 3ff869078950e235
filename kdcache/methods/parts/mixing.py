"""The slot M: how the soft labels of all teachers become the targets of the student.

The result is logits again (softmax(m/T) is the mixture), so every soft-label loss takes the same input, whether it
works on probabilities or on logits.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_TIE = 1e-5  # shares of votes that differ by less are equal


class Mixing(Protocol):
    """From N teachers to M targets: (logits ``[M, batch, classes]``, weights ``[M, batch]``)."""

    def __call__(self, teacher_logits: Tensor, weights: Tensor, temperature: float, /) -> tuple[Tensor, Tensor]:
        """Shapes: teacher_logits ``[teachers, batch, classes]``, weights ``[teachers, batch]``."""
        ...


def each_teacher(teacher_logits: Tensor, weights: Tensor, _temperature: float, /) -> tuple[Tensor, Tensor]:
    """M = N: every teacher is a target with its own weight, so the losses are summed."""
    return teacher_logits, weights


def mean_loss(teacher_logits: Tensor, weights: Tensor, _temperature: float, /) -> tuple[Tensor, Tensor]:
    """M = N: every teacher is a target, and the losses are averaged by the teachers' shares of the weights."""
    return teacher_logits, weights / weights.sum(dim=0)


def mean_probability(teacher_logits: Tensor, weights: Tensor, temperature: float, /) -> tuple[Tensor, Tensor]:
    """M = 1: the mean of the teachers' softened probabilities, by their shares of the weights on the row."""
    shares = (weights / weights.sum(dim=0)).unsqueeze(-1)
    log_mean = torch.logsumexp(F.log_softmax(teacher_logits / temperature, dim=-1) + shares.log(), dim=0, keepdim=True)
    return temperature * log_mean, torch.ones_like(weights[:1])


def mean_logit(teacher_logits: Tensor, weights: Tensor, _temperature: float, /) -> tuple[Tensor, Tensor]:
    """M = 1: the mean of the teachers' logits, by their shares of the weights on the row."""
    shares = (weights / weights.sum(dim=0)).unsqueeze(-1)
    return (shares * teacher_logits).sum(dim=0, keepdim=True), torch.ones_like(weights[:1])


def majority_vote(teacher_logits: Tensor, weights: Tensor, temperature: float, /) -> tuple[Tensor, Tensor]:
    """M = 1: each teacher votes for its most probable class with its weight; logits are the shares of the votes.

    Of classes with equally many votes, the one with the highest mean probability wins: the others get the logit -1.
    """
    votes = F.one_hot(teacher_logits.argmax(dim=-1), teacher_logits.shape[-1]).to(weights.dtype)
    shares = ((weights / weights.sum(dim=0)).unsqueeze(-1) * votes).sum(dim=0, keepdim=True)
    mean, ones = mean_probability(teacher_logits, weights, temperature)
    tied = shares >= shares.amax(dim=-1, keepdim=True) - _TIE
    winner = torch.where(tied, mean, -torch.inf).argmax(dim=-1, keepdim=True)
    return torch.where(tied, -1.0, shares).scatter(-1, winner, shares.amax(dim=-1, keepdim=True)), ones
