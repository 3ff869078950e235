"""MT-BERT: soft labels of every teacher, weighted by its error on the row, and hidden states of every layer."""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.hidden_states import HiddenStates
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss
from kdcache.methods.parts.weighting import inverse_cross_entropy

METHOD = Method(
    "mt-bert",
    "MT-BERT",
    "Wu, Wu, Huang, Findings of ACL-IJCNLP 2021, arXiv 2106.01023",
    terms=(TaskLoss(), SoftLabels(), HiddenStates()),
    weighting=inverse_cross_entropy,
    note="soft labels weighted by each teacher's error on the row, and hidden states of every layer",
)
