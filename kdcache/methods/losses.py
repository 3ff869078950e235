"""``kdcache.losses``: the losses as plain functions and modules, for your own training loop.

They take and return tensors and numbers, and need neither recipe nor cache. ``kdcache distill`` uses the same code::

    soft = losses.DistillationLoss(temperature=2.0)
    loss = losses.task_loss(logits, labels) + soft(logits, teacher_logits, labels)

Every loss is a sum over rows or tokens divided by a count, by default that of the given batch. For a step of several
micro-batches, give the count of the whole step: their losses then add up to the loss of the step.
"""

from __future__ import annotations

from kdcache.methods.base import Direction, Pair
from kdcache.methods.parts.hidden_states import (
    balanced_mean,
    cosine_distance,
    mean_squared_error,
    plain_sum,
    share_of_variance,
    squared_distance,
)
from kdcache.methods.parts.mixing import Mixing, each_teacher, majority_vote, mean_logit, mean_loss, mean_probability
from kdcache.methods.parts.projections import HiddenProjections
from kdcache.methods.parts.relations import angle_relation, cosine_relation, distance_relation
from kdcache.methods.parts.soft_labels import (
    Decoupled,
    DistillationLoss,
    SoftLoss,
    hard_cross_entropy,
    kl_divergence,
    logit_squared_error,
    soft_cross_entropy,
    soft_losses,
)
from kdcache.methods.parts.task_loss import task_loss
from kdcache.methods.parts.weighting import (
    Weighting,
    confidence,
    inverse_cross_entropy,
    low_entropy,
    one,
    softmax_of_errors,
    teacher_cross_entropy,
    teacher_weights,
)

__all__ = [
    "Decoupled",
    "Direction",
    "DistillationLoss",
    "HiddenProjections",
    "Mixing",
    "Pair",
    "SoftLoss",
    "Weighting",
    "angle_relation",
    "balanced_mean",
    "confidence",
    "cosine_distance",
    "cosine_relation",
    "distance_relation",
    "each_teacher",
    "hard_cross_entropy",
    "inverse_cross_entropy",
    "kl_divergence",
    "logit_squared_error",
    "low_entropy",
    "majority_vote",
    "mean_logit",
    "mean_loss",
    "mean_probability",
    "mean_squared_error",
    "one",
    "plain_sum",
    "share_of_variance",
    "soft_cross_entropy",
    "soft_losses",
    "softmax_of_errors",
    "squared_distance",
    "task_loss",
    "teacher_cross_entropy",
    "teacher_weights",
]
