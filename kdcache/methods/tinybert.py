"""TinyBERT: hidden states first, then soft labels; no task loss.

    first half of the training:   L = sum over layers of MSE(W h_s,j, h_i,l)
    second half:                  L = CE(softmax(z/T), softmax(z_s/T))

The order is that of the paper's task-specific distillation (section 3 and the released code). The paper also matches
attention matrices and embeddings, which a cache does not hold. It trains the two stages one after the other with a
learning rate each; here one training with one decay is cut in the middle. W is on the student's side. Of several
teachers the soft labels are averaged as in ``kd``, and so are the hidden losses. Labels are not used at all.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.hidden_states import HiddenStates
from kdcache.methods.parts.mixing import mean_probability
from kdcache.methods.parts.schedule import Stages
from kdcache.methods.parts.soft_labels import SoftLabels

METHOD = Method(
    "tinybert",
    "TinyBERT (order)",
    "Jiao et al., Findings of EMNLP 2020, arXiv 1909.10351, section 3",
    terms=(SoftLabels(mixing=mean_probability), HiddenStates("tokens", paper_direction="student-to-teacher")),
    schedule=Stages(((0.5, ("hidden",)), (1.0, ("soft",)))),
    note="hidden states of every layer in the first half, soft labels in the second; no labels",
)
