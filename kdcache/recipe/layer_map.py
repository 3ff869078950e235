"""The layer map of MT-BERT (section 3.2): which teacher layer a student layer learns from. The dump and the distillation share it."""

from __future__ import annotations


def even_layers(depth: int, student_layers: int) -> tuple[int, ...]:
    """The teacher layer g(j) = round(j·depth/K) for each student layer j = 1..K, in the order of j.

    The last student layer always meets the last teacher layer. A student deeper than the teacher meets some layers twice.
    """
    return tuple(round(j * depth / student_layers) for j in range(1, student_layers + 1))
