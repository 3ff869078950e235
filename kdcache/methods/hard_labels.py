"""Hard pseudo-labels: the class that most teachers name is the label, on all rows.

    L = L_task + CE(c, z_s),    c = majority of argmax z_i

On labelled rows this is the hard-label distillation of DeiT, where both terms weigh 1/2. On rows without a label it is
pseudo-labelling (Lee, 2013). Of several teachers each has one vote. Of classes with equally many votes, the one with
the highest mean probability wins. ``weights.task = 0`` trains on the teachers' labels alone. ``distill.temperature``
softens the probabilities of that mean only, and ``t_squared`` is not used.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.mixing import majority_vote
from kdcache.methods.parts.soft_labels import SoftLabels, hard_cross_entropy
from kdcache.methods.parts.task_loss import TaskLoss

METHOD = Method(
    "hard-labels",
    "hard pseudo-labels",
    "Touvron et al., ICML 2021, arXiv 2012.12877, hard-label distillation; the majority of several teachers",
    terms=(TaskLoss(), SoftLabels(hard_cross_entropy, majority_vote, softened=False)),
    note="the majority of the teachers' most probable classes as labels, on rows with and without gold labels",
)
