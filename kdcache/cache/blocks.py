"""What a teacher predicts for the texts of a part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Outputs:
    """What a teacher predicts for the ``n`` texts of a part."""

    logits: np.ndarray  # float32[n, classes], raw: never a probability
    pooled: np.ndarray | None = None  # float32[n, width]
