"""float8: eight bits of floating point (e4m3) per coordinate and one float32 scale per row; value = number x scale.

A sign, four bits of exponent, three of mantissa: the error is relative to the coordinate, while that of int8 is
relative to the largest coordinate of the row. It suits states at full width, in which some dimensions are a hundred
times larger than the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kdcache.codecs.base import HiddenBlock, RowScaledFormat

if TYPE_CHECKING:
    import torch

    from kdcache.codecs.base import Basis, Decoder, LayerSpec

LARGEST = 448.0  # of e4m3; the scale of a row is absmax / 448, so no number is larger
NAN = 0x7F  # with either sign; never written. 255 is the fill value, so a missing chunk is detected


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values float32 [256], the distance to the next value float32 [256], and the borders float32 [126] of the codes 0
    to 0x7e.

    A border is halfway between two values, and is rounded to the even code. If the upper code is even, the border is a
    little lower, so that a code is always the number of borders below.
    """
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    step = np.ldexp(1.0, np.maximum(exponent, 1) - 10)
    values = np.where(code & 128, -1.0, 1.0) * step * np.where(exponent > 0, 8 + mantissa, mantissa)
    values[(code & NAN) == NAN] = np.nan
    borders = ((values[:NAN][:-1] + values[:NAN][1:]) / 2).astype(np.float32)
    borders[1::2] = np.nextafter(borders[1::2], np.float32(0.0))
    return values.astype(np.float32), step.astype(np.float32), borders


VALUES, _STEPS, _BORDERS = _tables()


class Float8(RowScaledFormat):
    """|x - decoded| <= the larger of |x| / 16 and scale / 1024. Encoding decoded values gives the same codes."""

    name = "float8"
    dtype = "uint8"
    limit = LARGEST

    def codes(self, numbers: np.ndarray) -> np.ndarray:
        codes: np.ndarray = np.searchsorted(_BORDERS, np.abs(numbers)).astype(np.uint8)
        codes |= np.signbit(numbers).astype(np.uint8) << 7
        return codes

    def codes_on_device(self, numbers: torch.Tensor) -> torch.Tensor:
        import torch

        numbers = numbers.cpu() if numbers.device.type == "mps" else numbers  # MPS has no float8
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8)

    def step(self, block: HiddenBlock) -> np.ndarray:
        steps: np.ndarray = np.linalg.norm(_STEPS[block.values].astype(np.float64), axis=1)
        return steps

    def decode(self, block: HiddenBlock, basis: Basis) -> np.ndarray:
        assert block.scales is not None
        values: np.ndarray = VALUES[block.values]
        values *= block.scales[:, None]
        return values

    def decoder(self, basis: Basis | None) -> Decoder | None:
        import torch

        tables = {torch.device("cpu"): torch.from_numpy(VALUES)}

        def numbers(codes: torch.Tensor) -> torch.Tensor:
            if codes.device.type == "cuda":
                return codes.view(torch.float8_e4m3fn).to(torch.float32)
            if codes.device not in tables:
                tables[codes.device] = tables[torch.device("cpu")].to(codes.device)
            return tables[codes.device].index_select(0, codes.reshape(-1).int()).view(codes.shape)

        return numbers

    def check_block(self, block: HiddenBlock, spec: LayerSpec, rows: int) -> None:
        super().check_block(block, spec, rows)
        if (block.values & NAN == NAN).any():
            raise ValueError("has the code 127 or 255, which are NaN")

    def finite_rows(self, block: HiddenBlock) -> np.ndarray:
        assert block.scales is not None
        finite: np.ndarray = np.isfinite(block.scales)
        return finite


FLOAT8 = Float8()
