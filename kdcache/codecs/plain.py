"""float32 and float16: uncompressed floating point numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kdcache.codecs.base import HiddenBlock, Rounding, StorageFormat, StoredArray, largest_of

if TYPE_CHECKING:
    import torch

    from kdcache.codecs.base import Basis, LayerSpec, OnDevice, OnHost

_FLOAT16_LIMIT = 65520.0  # values from here on round to infinity
_HALF_ULP, _HALF_LEAST = 2.0**-11, 2.0**-25  # of float16: relative, and below its normal numbers


class Float32(StorageFormat):
    """Lossless."""

    name = "float32"

    def arrays(self, spec: LayerSpec, rows: int) -> tuple[StoredArray, ...]:
        return (StoredArray("", (rows, spec.dim), self.name),)

    def encode(self, values: np.ndarray, spec: LayerSpec, basis: Basis) -> HiddenBlock:
        self.check_storable(largest_of(values))
        return HiddenBlock(np.ascontiguousarray(values, dtype=self.name))

    def encoder_steps(self, spec: LayerSpec, basis: Basis, device: torch.device | str) -> tuple[OnDevice, OnHost]:
        import torch

        dtype = getattr(torch, self.name)
        return lambda values: (values.to(dtype),), lambda arrays: HiddenBlock(*arrays)

    def rounding(self, block: HiddenBlock, projected: np.ndarray, spec: LayerSpec, basis: Basis) -> Rounding:
        zero = np.zeros(len(block))
        return Rounding(zero, zero)


class Float16(Float32):
    """Rounded to eleven bits; a value beyond 65504 is refused."""

    name = "float16"

    def unstorable(self, largest: np.ndarray) -> tuple[int, str] | None:
        fault = super().unstorable(largest)
        if fault is None and (largest >= _FLOAT16_LIMIT).any():
            row = int(np.argmax(largest >= _FLOAT16_LIMIT))
            return row, f"{largest[row]:.6g} is beyond float16, whose largest number is 65504"
        return fault

    @property
    def cure(self) -> str:
        return (
            'Set dump.dtype = "int8" or "float32"; if the value is not finite, '
            "the teacher's weights or precision are at fault."
        )

    def rounding(self, block: HiddenBlock, projected: np.ndarray, spec: LayerSpec, basis: Basis) -> Rounding:
        size = np.linalg.norm(block.values.astype(np.float64), axis=1) * _HALF_ULP
        return Rounding(np.hypot(size, _HALF_LEAST * np.sqrt(spec.dim)), size / np.sqrt(3))


FLOAT32, FLOAT16 = Float32(), Float16()
