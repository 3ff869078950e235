"""Annealing-KD: logits that grow to the teacher's in steps, then the gold labels.

    first two thirds:   L = MSE(z_s, f z),    f = 1/10, 2/10, …, 1 in equal shares of the steps
    last third:         L = L_task

f and the shares are those of the released code: a highest temperature of 10, and 200 and 100 epochs. The squared errors
are averaged over the classes, as in that code. Of several teachers it takes the mean of the logits, which gives the
gradient of the mean of the losses. Rows without a label have a loss in the first part only. ``distill.temperature`` and
``t_squared`` are not used.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.mixing import mean_logit
from kdcache.methods.parts.schedule import Stages, Staircase
from kdcache.methods.parts.soft_labels import SoftLabels, logit_squared_error
from kdcache.methods.parts.task_loss import TaskLoss

_SOFT = 2 / 3  # share of the training

METHOD = Method(
    "annealing-kd",
    "Annealing-KD",
    "Jafari, Rezagholizadeh, Sharma, Ghodsi, EACL 2021, arXiv 2104.07163, section 3",
    terms=(TaskLoss(), SoftLabels(logit_squared_error, mean_logit, target_scale=Staircase(10, _SOFT), softened=False)),
    schedule=Stages(((_SOFT, ("soft",)), (1.0, ("task",)))),
    note="squared error of logits that grow to the teachers', then the gold labels alone",
)
