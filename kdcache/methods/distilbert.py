"""DistilBERT: soft labels, and the directions of the last layer's states.

    L = L_task + CE(softmax(z/T), softmax(z_s/T)) + mean over tokens of (1 - cos(W h_s, h_i))

The paper has these three losses in pre-training, with masked language modelling as the task. Its released code weighs
them 5 (soft), 2 (task) and 1 (cosine); here ``distill.weights`` does. Student and teacher have one width there and no
W (``paper = true``); for other widths the recipe chooses the side of W. Of several teachers the soft labels are
averaged as in ``kd``, and so are the hidden losses. Rows without a label have no task loss.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.hidden_states import COSINE, HiddenStates
from kdcache.methods.parts.layer_map import LAST
from kdcache.methods.parts.mixing import mean_probability
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss

METHOD = Method(
    "distilbert",
    "DistilBERT (cosine)",
    "Sanh, Debut, Chaumond, Wolf, arXiv 1910.01108, section 2",
    terms=(
        TaskLoss(),
        SoftLabels(mixing=mean_probability),
        HiddenStates("tokens", distance=COSINE, paper_direction="none"),
    ),
    layer_map=LAST,
    note="soft labels and the cosine of the last layer's tokens",
)
