"""Relational knowledge distillation: match the teacher's distances and angles among the rows of a batch.

    L = L_task + 25 L_distance + 50 L_angle    (section 3.2; the factors are those for classification, section 4.2)

A text's vector is the mean of the last layer's states. Relations are compared, not coordinates, so there is no W.
For factors 1 and 2, the paper's for metric learning, set ``weights.hidden = 0.04``. Of several teachers the losses are
averaged, or summed with ``paper = true``.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.hidden_states import HiddenRelations
from kdcache.methods.parts.layer_map import LAST
from kdcache.methods.parts.relations import angle_relation, distance_relation
from kdcache.methods.parts.task_loss import TaskLoss

METHOD = Method(
    "rkd",
    "RKD (distances and angles)",
    "Park, Kim, Lu, Cho, CVPR 2019, arXiv 1904.05068, section 3.2",
    terms=(TaskLoss(), HiddenRelations(((25.0, distance_relation), (50.0, angle_relation)), "mean")),
    layer_map=LAST,
    note="distances and angles among the rows of a batch, in the last layer; no soft labels",
)
