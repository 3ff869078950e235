"""CA-MKD: teachers weighted by their confidence on the row.

    w_i = (1 - exp(CE_i) / sum_j exp(CE_j)) / (N - 1),    CE_i = CE(y, softmax(z_i))
    L = L_task + sum_i w_i CE(softmax(z_i/T), softmax(z_s/T)) + sum_i w_i MSE(W_i h_s, h_i)

The factors alpha and beta of the paper are those of ``distill.weights``. The paper takes the weights of the hidden
states from the teacher's classifier applied to the student's projected states; a cache holds no classifier, so both
terms use the same weights. The hidden states are those of the last layer. Without ``paper = true`` the hidden losses
are also divided by variance and number of teachers. Rows without a label have w_i = 1/N.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.hidden_states import HiddenStates
from kdcache.methods.parts.layer_map import LAST
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss
from kdcache.methods.parts.weighting import confidence

METHOD = Method(
    "ca-mkd",
    "CA-MKD",
    "Zhang, Chen, Wang, ICASSP 2022, arXiv 2201.00007",
    terms=(TaskLoss(), SoftLabels(), HiddenStates(weighted=True, paper_direction="student-to-teacher")),
    weighting=confidence,
    layer_map=LAST,
    note="soft labels and the last layer, both weighted by each teacher's confidence in the gold label",
)
