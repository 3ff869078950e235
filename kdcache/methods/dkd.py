"""Decoupled KD: the target class and the other classes are two losses with factors of their own.

    L = L_task + 1 * TCKD + 8 * NCKD    (the factors are those for CIFAR-100)

TCKD compares the probability of the target class, NCKD the distribution within the other classes. With two classes NCKD
is 0. The target class is the gold label. On rows without one it is the teacher's most probable class. Of several
teachers it takes the mean probability, as ``kd`` does. Set ``t_squared = true`` for the factor T² of the released code.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.mixing import mean_probability
from kdcache.methods.parts.soft_labels import Decoupled, SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss

METHOD = Method(
    "dkd",
    "DKD",
    "Zhao, Cui, Song, Qiu, Liang, CVPR 2022, arXiv 2203.08679, section 3",
    terms=(TaskLoss(), SoftLabels(Decoupled(alpha=1.0, beta=8.0), mean_probability, reads_labels=True)),
    note="target class and other classes apart; for more than two classes",
)
