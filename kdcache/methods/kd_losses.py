"""Knowledge distillation with the mean over the teachers of their losses.

    L = L_task + 1/N * sum_i CE(softmax(z_i/T), softmax(z_s/T))

Cross-entropy is linear in its target, so loss and gradient are those of ``kd``: the mean of the losses is the loss of
the mean probability. This method also logs the loss of every teacher. Rows without a label have the soft loss alone.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.mixing import mean_loss
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss

METHOD = Method(
    "kd-losses",
    "mean of soft losses",
    "Hinton, Vinyals, Dean, arXiv 1503.02531, with the mean over the teachers of its loss",
    terms=(TaskLoss(), SoftLabels(mixing=mean_loss)),
    note="the mean of the soft losses; the gradient of kd, with the loss of each teacher logged",
)
