"""SKDBERT, student-rank: in every step one teacher, those with better students more often.

The paper measures the benefit for the student: it distils a student from each teacher alone and ranks the teachers by
these students. Their validation scores are given as ``distill.student_scores``. The probability is proportional to the
rank: 1 for the worst, N for the best of N. The paper names the distribution; that it is linear in the rank is our
choice. Loss as in ``skdbert``.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.schedule import SampledByStudentRank
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss

METHOD = Method(
    "skdbert-student",
    "SKDBERT (student rank)",
    "Ding et al., AAAI 2023, arXiv 2211.14466, student-rank distribution",
    terms=(TaskLoss(), SoftLabels()),
    teachers=SampledByStudentRank(),
    note="one teacher per step, by the rank of the student that it alone gives",
)
