"""Dynamic KD: where the student is uncertain it learns from weaker teachers, where it is certain from better ones.

    u = entropy of softmax(z_s) / log C
    L = L_task + sum_i w_i CE(softmax(z_i/T), softmax(z_s/T))

The paper's dynamic teacher adoption is for two teachers: w = u for the small one and 1 - u for the large one, on each
row (as in the released code). Here the order is that of the validation scores, and teachers between the two ends get a
linear mixture of both weights. The weights sum to 1 and no gradient flows through u. The paper's choice of rows saves
teacher queries, which a cache does not need. Rows without a label are weighted in the same way.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss
from kdcache.methods.parts.weighting import ByStudentUncertainty

METHOD = Method(
    "dynamic-kd",
    "dynamic KD",
    "Li, Lin, Ren, Li, Zhou, Sun, EMNLP 2021, arXiv 2109.11295, dynamic teacher adoption",
    terms=(TaskLoss(), SoftLabels()),
    weighting=ByStudentUncertainty(),
    note="soft labels, of weaker teachers where the student is uncertain, of better ones where it is certain",
)
