"""Tiny-NewsRec: teachers weighted by softmax(-CE_i), in the soft labels and in the hidden states.

    a_i = softmax over teachers of -CE(y, z_i)
    L = L_task + CE(softmax(z/T), softmax(z_s/T)) + sum_i a_i MSE(h_s, W_i h_i),    z = sum_i a_i z_i

This is the second stage of the paper, as in the released code: the mean is of logits, and W_i is on the teacher's side.
Without ``paper = true`` the hidden losses are also divided by variance and number of teachers, and the recipe chooses
the side of W. The paper compares the vector of a text, which it pools with attention. Here it is the mean of the tokens
of the last layer. Rows without a label have a_i = 1/N.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.hidden_states import HiddenStates
from kdcache.methods.parts.layer_map import LAST
from kdcache.methods.parts.mixing import mean_logit
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss
from kdcache.methods.parts.weighting import softmax_of_errors

METHOD = Method(
    "tiny-newsrec",
    "Tiny-NewsRec",
    "Yu, Wu, Wu, Yi, Liu, EMNLP 2022, arXiv 2112.00944, second stage of the distillation",
    terms=(TaskLoss(), SoftLabels(mixing=mean_logit), HiddenStates("mean", weighted=True)),
    weighting=softmax_of_errors,
    layer_map=LAST,
    note="logits and the last layer's means, both weighted by the softmax of the teachers' errors on the row",
)
