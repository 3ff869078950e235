"""The arrays of a cache: what a teacher said of one part, and the bases that its hidden states are projected on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from kdcache.cache.codebook import Codebook


@dataclass(frozen=True)
class Outputs:
    """What a teacher predicts for the ``n`` texts of a part."""

    logits: np.ndarray  # float32[n, classes], raw: never a probability
    pooled: np.ndarray | None = None  # float32[n, width]


@dataclass(frozen=True)
class HiddenBlock:
    """Hidden states of one layer and part, packed: one row per token, or per text where the layer is stored so.

    int8: value = code * scale, codes in -127..127. uint8: rows of a coded layer, which the codebook of its basis decodes.
    """

    values: np.ndarray  # float32 | float16 | int8 [T, dim], or uint8 [T, bytes]
    scales: np.ndarray | None = None  # float32[T], for int8 only


@dataclass(frozen=True)
class Basis:
    """The frozen projection P and mean m of one layer; what is stored is ``P (h - m)``. ``components`` is None for 'none'.

    A coded layer has the codebook of its rows here, and ``dim`` coordinates with at least one bit each.
    """

    components: np.ndarray | None  # float32[dim, width], rows orthonormal
    mean: np.ndarray | None  # float32[width]
    explained_variance: np.ndarray | None  # float32[dim], variance of the stored coordinates on the sample
    total_variance: float  # mean over the width of the variance of h over the sample's tokens
    target_variance: float  # mean over dim of the variance over tokens of what is stored
    codebook: Codebook | None = None
