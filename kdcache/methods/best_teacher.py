"""Knowledge distillation from the one teacher with the best validation score: the baseline of several teachers.

    L = L_task + CE(softmax(z_b/T), softmax(z_s/T)),    b = teacher with the best score

The score is ``distill.select_by`` of the teacher's logits on the validation texts, which every cache with a validation
split holds. Without labelled validation texts the method is refused. To choose another teacher, use ``kd`` with
``distill.teachers = ["NAME"]``. Rows without a label have the soft loss alone.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.mixing import mean_probability
from kdcache.methods.parts.schedule import BestTeacher
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss

METHOD = Method(
    "best-teacher",
    "best teacher",
    "Hinton, Vinyals, Dean, arXiv 1503.02531, with the teacher of the best validation score",
    terms=(TaskLoss(), SoftLabels(mixing=mean_probability)),
    teachers=BestTeacher(),
    note="soft labels of the teacher with the best validation score",
)
