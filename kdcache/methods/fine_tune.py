"""Fine-tuning without teachers: what every method is compared with."""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.task_loss import TaskLoss

METHOD = Method(
    "fine-tune",
    "without teachers",
    "the baseline: the task loss alone",
    terms=(TaskLoss(),),
    note="the task loss alone; needs no cache",
)
