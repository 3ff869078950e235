"""Patient knowledge distillation: directions of the first token's state in the inner layers, and soft labels.

    L = L_task + L_DS + sum over j < K of |h_s,j / |h_s,j| - h_t,l / |h_t,l||²    (section 3)

The map is PKD-Skip: every (depth/K)-th layer, and the last student layer has no partner. The weights α and β are
those of ``distill.weights``. Of several teachers the soft labels are averaged, as in ``kd``. In the paper student and
teacher have the same width and there is no W (``paper = true``). For other widths the recipe chooses the side of W.
"""

from __future__ import annotations

from kdcache.methods.base import Method
from kdcache.methods.parts.hidden_states import SQUARED, HiddenStates
from kdcache.methods.parts.layer_map import Draw, LayerMapping, TeacherLayers, even_layers
from kdcache.methods.parts.mixing import mean_probability
from kdcache.methods.parts.soft_labels import SoftLabels
from kdcache.methods.parts.task_loss import TaskLoss


def _skip(teacher: TeacherLayers, student_layers: int, _draw: Draw, /) -> tuple[int | None, ...]:
    return (*even_layers(teacher.depth, student_layers)[:-1], None)


METHOD = Method(
    "pkd",
    "PKD (skip)",
    "Sun, Cheng, Gan, Liu, EMNLP 2019, arXiv 1908.09355, section 3",
    terms=(
        TaskLoss(),
        SoftLabels(mixing=mean_probability),
        HiddenStates("first", normalised=True, distance=SQUARED, paper_direction="none"),
    ),
    layer_map=LayerMapping("skip", _skip),
    note="directions of the first token's state in every layer but the last, and soft labels",
)
