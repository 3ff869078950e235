"""From float32 token vectors to what is stored, and back.

int8 is symmetric with one scale per token (absmax / 127): hidden states differ in size from token to token far more than
from dimension to dimension once they are projected and centred, and a scale per token keeps a part's tokens independent.
Nothing saturates silently: a value that the stored type cannot hold is an error that names its token.
"""

from __future__ import annotations

import numpy as np

from kdcache.cache.blocks import HiddenBlock
from kdcache.errors import NonFiniteError

CODE_LIMIT = 127  # codes lie in -127..127; -128 is the fill value that betrays a missing chunk
_SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)
_FLOAT16_LIMIT = 65520.0  # from here on, float16 rounds to infinity


def quantise(x: np.ndarray, dtype: str) -> HiddenBlock:
    """``x`` float32 [tokens, dim] as it is stored in ``dtype``: 'float32', 'float16' or 'int8'.

    int8: |x - decoded| <= scale / 2; an all-zero token (absmax below 127 times the smallest normal float32) gets scale 0 and
    decodes to zeros. Quantising what was decoded gives the same codes again.
    Raises NonFiniteError with the token's row where x is not finite, or too large for float16.
    """
    found = unstorable_token(x, dtype)
    if found is not None:
        token, reason = found
        raise NonFiniteError(f"token {token}: {reason}", cure_of(dtype))
    if dtype == "float32":
        return HiddenBlock(np.ascontiguousarray(x, dtype=np.float32), None)
    if dtype == "float16":
        return HiddenBlock(x.astype(np.float16), None)
    largest = np.abs(x).max(axis=1, initial=0.0).astype(np.float32)
    scales = largest / np.float32(CODE_LIMIT)
    scales[scales < _SMALLEST_SCALE] = 0.0
    divisors = np.where(scales > 0.0, scales, np.float32(np.inf))
    codes = np.rint(x / divisors[:, None])
    return HiddenBlock(np.clip(codes, -CODE_LIMIT, CODE_LIMIT).astype(np.int8), scales)


def dequantise(block: HiddenBlock) -> np.ndarray:
    """float32 [tokens, dim] of a stored block."""
    values: np.ndarray = block.values.astype(np.float32)
    if block.scales is not None:
        values *= block.scales[:, None]
    return values


def unstorable_token(x: np.ndarray, dtype: str) -> tuple[int, str] | None:
    """The first token of ``x`` [tokens, dim] that ``dtype`` cannot hold, and why; None where all can be held."""
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        return int(np.argmin(finite)), "NaN or infinity"
    if dtype == "float16":
        largest = np.abs(x).max(axis=1, initial=0.0)
        if (largest >= _FLOAT16_LIMIT).any():
            token = int(np.argmax(largest >= _FLOAT16_LIMIT))
            return token, f"{largest[token]:.6g} is beyond float16, whose largest number is 65504"
    return None


def cure_of(dtype: str) -> str:
    """The hint that goes with a value that ``dtype`` cannot hold."""
    if dtype == "float16":
        return (
            'Set dump.dtype = "int8" or "float32"; if the value is not finite, the teacher\'s weights or precision are at fault.'
        )
    return 'The teacher is at fault: check that its training did not diverge, or set dump.precision = "float32".'
