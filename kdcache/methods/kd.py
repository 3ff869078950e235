"""Knowledge distillation from the mean of the teachers."""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.mixing import mean_probability
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss

METHOD = Method(
    "kd",
    "mean of soft labels",
    "Hinton, Vinyals, Dean, arXiv 1503.02531, with the mean of the teachers' probabilities as its teacher",
    terms=(TaskLoss(), SoftLabels(mixing=mean_probability)),
    note="one target: the mean of the teachers' softened probabilities",
)
