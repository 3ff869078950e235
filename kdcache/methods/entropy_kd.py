"""Entropy-based distillation: teachers that are certain about a row weigh more. It needs no label.

    w_i = (1 - H_i / sum_j H_j) / (N - 1),    H_i = entropy of softmax(z_i)
    L = L_task + sum_i w_i CE(softmax(z_i/T), softmax(z_s/T))

The paper weighs teachers with lower entropy more. The formula is that of the code which the authors of CA-MKD released
for their comparison, divided by N - 1 so that the weights sum to 1. The probabilities of the entropy are not softened.
Rows without a label are weighted in the same way.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss
from kdcache.methods.parts.weighting import low_entropy

METHOD = Method(
    "entropy-kd",
    "entropy of the teachers",
    "Kwon, Na, Lee, Kim, ICASSP 2020, doi 10.1109/ICASSP40776.2020.9054698",
    terms=(TaskLoss(), SoftLabels()),
    weighting=low_entropy,
    note="soft labels weighted by each teacher's certainty on the row; needs no label",
)
