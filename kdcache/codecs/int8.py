"""int8: a code per coordinate and one scale per row; value = code x scale.

The scale is absmax / 127 of the row. Projected and centred hidden states differ in size between tokens far more than
between dimensions, and a scale per row keeps the rows of a part independent.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kdcache.codecs.base import HiddenBlock, RowScaledFormat

if TYPE_CHECKING:
    import torch

    from kdcache.codecs.base import LayerSpec

CODE_LIMIT = 127  # codes are -127..127; -128 is the fill value, so a missing chunk is detected
_CUTS = (32, 64, 128, 256, 512)  # dimensions of PCA that a plan measures


class Int8(RowScaledFormat):
    """|x - decoded| <= scale / 2. Encoding decoded values gives the same codes."""

    name = "int8"
    dtype = "int8"
    limit = float(CODE_LIMIT)

    def candidates(self, whole: LayerSpec) -> tuple[LayerSpec, ...]:
        return whole, *(replace(whole, projection="pca", dim=dim) for dim in _CUTS if dim < whole.dim)

    def codes(self, numbers: np.ndarray) -> np.ndarray:
        codes: np.ndarray = np.clip(np.rint(numbers), -CODE_LIMIT, CODE_LIMIT).astype(np.int8)
        return codes

    def codes_on_device(self, numbers: torch.Tensor) -> torch.Tensor:
        import torch

        return numbers.round_().clamp_(-CODE_LIMIT, CODE_LIMIT).to(torch.int8)

    def step(self, block: HiddenBlock) -> np.ndarray:
        return np.full(len(block), np.sqrt(block.values.shape[1]))

    def check_block(self, block: HiddenBlock, spec: LayerSpec, rows: int) -> None:
        super().check_block(block, spec, rows)
        if rows and block.values.min() < -CODE_LIMIT:
            raise ValueError("has the code -128; codes are -127 to 127")


INT8 = Int8()
