"""SKDBERT, teacher-rank: in every step one teacher, better teachers more often.

The paper derives the probabilities from the teachers' own scores. Here the score is ``distill.select_by`` of the
teacher's logits on the validation texts, and the probability is proportional to the rank: 1 for the worst, N for the
best of N. The paper names the distribution; that it is linear in the rank is our choice. Loss as in ``skdbert``.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.schedule import SampledByTeacherRank
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss

METHOD = Method(
    "skdbert-teacher",
    "SKDBERT (teacher rank)",
    "Ding et al., AAAI 2023, arXiv 2211.14466, teacher-rank distribution",
    terms=(TaskLoss(), SoftLabels()),
    teachers=SampledByTeacherRank(),
    note="one teacher per step, by the rank of its validation score",
)
