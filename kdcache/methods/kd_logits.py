"""Knowledge distillation from the mean of the teachers' logits.

    L = L_task + CE(softmax(z/T), softmax(z_s/T)),    z = mean over teachers of z_i

softmax(z) is the geometric mean of the teachers' probabilities, one of the two means that the introduction of the paper
names for ensembles. Rows without a label have the soft loss alone. Weights of teachers are shares of the mean.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.mixing import mean_logit
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss

METHOD = Method(
    "kd-logits",
    "mean of logits",
    "Hinton, Vinyals, Dean, arXiv 1503.02531, with the mean of the teachers' logits as its teacher",
    terms=(TaskLoss(), SoftLabels(mixing=mean_logit)),
    note="one target: the mean of the teachers' logits",
)
