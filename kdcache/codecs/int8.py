"""int8: a code per coordinate and one scale per row; value = code x scale.

The scale is absmax / 127 of the row. Projected and centred hidden states differ in size between tokens far more than
between dimensions, and a scale per row keeps the rows of a part independent.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kdcache.codecs.base import (
    HiddenBlock,
    Rounding,
    StorageFormat,
    StoredArray,
    largest_of,
    scale_on_device,
    scale_rows,
)

if TYPE_CHECKING:
    import torch

    from kdcache.codecs.base import Basis, Encoder, LayerSpec

CODE_LIMIT = 127  # codes are -127..127; -128 is the fill value, so a missing chunk is detected
_CUTS = (32, 64, 128, 256, 512)  # dimensions of PCA that a plan measures


class Int8(StorageFormat):
    """|x - decoded| <= scale / 2.

    An all-zero row (absmax below 127 times the smallest normal float32) gets scale 0 and decodes to zeros. Encoding
    what was decoded gives the same codes again.
    """

    name = "int8"

    def arrays(self, spec: LayerSpec, rows: int) -> tuple[StoredArray, ...]:
        return StoredArray("", (rows, spec.dim), "int8"), StoredArray("-scale", (rows,), "float32")

    def candidates(self, whole: LayerSpec) -> tuple[LayerSpec, ...]:
        return whole, *(replace(whole, projection="pca", dim=dim) for dim in _CUTS if dim < whole.dim)

    def encode(self, values: np.ndarray, spec: LayerSpec, basis: Basis) -> HiddenBlock:
        largest = largest_of(values).astype(np.float32)
        self.check_storable(largest)
        numbers, scales = scale_rows(values, largest, CODE_LIMIT)
        return HiddenBlock(np.clip(np.rint(numbers), -CODE_LIMIT, CODE_LIMIT).astype(np.int8), scales)

    def encoder(self, spec: LayerSpec, basis: Basis, device: torch.device | str) -> Encoder:
        import torch

        limit = torch.full((1,), float(CODE_LIMIT), device=device)

        def encoded(values: torch.Tensor) -> HiddenBlock:
            numbers, scales = scale_on_device(values, limit)
            codes = numbers.round_().clamp_(-CODE_LIMIT, CODE_LIMIT).to(torch.int8)
            return HiddenBlock(codes.cpu().numpy(), scales.cpu().numpy())

        return encoded

    def check_block(self, block: HiddenBlock, spec: LayerSpec, rows: int) -> None:
        super().check_block(block, spec, rows)
        if rows and block.values.min() < -CODE_LIMIT:
            raise ValueError("has the code -128; codes are -127 to 127")

    def rounding(self, block: HiddenBlock, projected: np.ndarray, spec: LayerSpec, basis: Basis) -> Rounding:
        assert block.scales is not None
        step = block.scales.astype(np.float64) * np.sqrt(spec.dim)
        return Rounding(step / 2 * 1.01, step / np.sqrt(12))


INT8 = Int8()
