"""SKDBERT: in every step one teacher, drawn with equal probability.

    L = L_task + CE(softmax(z_i/T), softmax(z_s/T)),    i drawn anew in every step

The paper draws from the same distribution for the whole training and proposes three: uniform (here), by the rank of the
teachers (``skdbert-teacher``) and by the rank of their students (``skdbert-student``). The draw depends on seed and
step only. The loss on rows without a label is the soft loss alone.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.schedule import SampledTeacher
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss

METHOD = Method(
    "skdbert",
    "SKDBERT (uniform)",
    "Ding et al., AAAI 2023, arXiv 2211.14466, uniform distribution",
    terms=(TaskLoss(), SoftLabels()),
    teachers=SampledTeacher(),
    note="one teacher per step, drawn with equal probability",
)
