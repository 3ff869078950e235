"""The codebook of a layer in trellis: the number of bits of each coordinate, and the tables of values.

A row is a string of bits, most significant first: b_0 bits of coordinate 0, then b_1 bits of coordinate 1, and so on.
The rest of the last byte is zero. The value of coordinate d is looked up by the last max(window, b_d) bits of the row
up to the end of its own code, with zeros before the first bit of the row.

With ``window`` 0 this is a scalar quantiser. With a wider window a value depends on its code and on some bits before it
(a trellis code). The writer searches for the string with the closest values, which keeps more variance in the same
bytes. A reader still looks up all coordinates at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_BITS = 8  # of a coordinate, and of the window: the bits of one look-up are in two neighbouring bytes


@dataclass(frozen=True, eq=False)
class Codebook:
    """Value of coordinate d = scale[d] * table[b_d][window bits].

    ``levels`` are the tables of the depths that occur, in ascending order.
    """

    bits: np.ndarray  # uint8[dim], 1..8 each
    scale: np.ndarray  # float32[dim]
    window: int  # 0..8
    levels: np.ndarray  # float32[sum over depths b of 2 ** max(window, b)]

    @property
    def tables(self) -> dict[int, np.ndarray]:
        """By depth, float32[2 ** max(window, depth)], views of ``levels``."""
        sizes = table_sizes(self.bits, self.window)
        return dict(zip(sizes, np.split(self.levels, np.cumsum(list(sizes.values()))[:-1]), strict=True))


@dataclass(frozen=True, eq=False)
class Places:
    """The bits and the table of each coordinate, int64[dim] each.

    A row gets a zero byte before and after it. A coordinate is looked up by the 16 bits from ``byte`` on, shifted right
    by ``shift`` and masked by ``mask``. Its table begins at ``first`` in the levels.
    """

    byte: np.ndarray
    shift: np.ndarray
    mask: np.ndarray
    first: np.ndarray


def table_sizes(bits: np.ndarray, window: int) -> dict[int, int]:
    """Number of entries of the table of each depth that occurs, in ascending order of depth."""
    return {int(depth): 1 << max(window, int(depth)) for depth in np.unique(bits)}


def check_codebook(codebook: Codebook, dim: int, row_bytes: int) -> None:
    """Raises ValueError unless a codebook is valid for ``dim`` coordinates in rows of ``row_bytes``."""
    bits, scale, levels = codebook.bits, codebook.scale, codebook.levels
    if bits.shape != (dim,) or scale.shape != (dim,) or bits.dtype != np.uint8:
        raise ValueError(f"bits and scale have shapes {list(bits.shape)} and {list(scale.shape)}, expected [{dim}]")
    if not 1 <= bits.min() <= bits.max() <= MAX_BITS:
        raise ValueError(f"a coordinate has {bits.min()} to {bits.max()} bits, expected 1 to {MAX_BITS}")
    if bits.sum(dtype=np.int64) > 8 * row_bytes:
        raise ValueError(
            f"the coordinates have {bits.sum(dtype=np.int64)} bits, more than the {row_bytes} bytes of a row"
        )
    if not 0 <= codebook.window <= MAX_BITS:
        raise ValueError(f"the window is {codebook.window} bits, expected 0 to {MAX_BITS}")
    wanted = sum(table_sizes(bits, codebook.window).values())
    if levels.shape != (wanted,):
        raise ValueError(f"levels has shape {list(levels.shape)}, expected [{wanted}]")
    if not (np.isfinite(levels).all() and np.isfinite(scale).all() and (scale >= 0).all()):
        raise ValueError("levels or scale have values that are negative or not finite")


def places(codebook: Codebook) -> Places:
    """The places of a codebook."""
    bits = codebook.bits.astype(np.int64)
    width = np.maximum(bits, codebook.window)
    begin = np.cumsum(bits) - width + 8  # in a row with a byte before it
    sizes = table_sizes(codebook.bits, codebook.window)
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    first = np.array([starts[depth] for depth in codebook.bits.tolist()], dtype=np.int64)
    return Places(begin // 8, 16 - begin % 8 - width, (1 << width) - 1, first)


def decode_rows(rows: np.ndarray, codebook: Codebook) -> np.ndarray:
    """float32 [n, dim] of ``rows`` uint8 [n, bytes]."""
    where = places(codebook)
    padded = np.zeros((len(rows), rows.shape[1] + 2), dtype=np.int32)
    padded[:, 1:-1] = rows
    words = padded[:, :-1] << 8 | padded[:, 1:]
    entries = words[:, where.byte] >> where.shift & where.mask
    values: np.ndarray = codebook.levels[entries + where.first] * codebook.scale
    return values


def pack_windows(windows: np.ndarray, bits: np.ndarray, row_bytes: int) -> np.ndarray:
    """Rows uint8 [n, row_bytes] of ``windows`` uint8 [dim, n]: the last bits of a window belong to its coordinate."""
    counts, total = bits.astype(np.int64), int(bits.sum(dtype=np.int64))
    owner = np.repeat(np.arange(len(counts)), counts)
    below = np.cumsum(counts)[owner] - 1 - np.arange(total)  # bits of the same code to the right of this one
    flags = np.zeros((8 * row_bytes, windows.shape[1]), dtype=np.uint8)
    flags[:total] = windows[owner]
    flags[:total] >>= below.astype(np.uint8)[:, None]
    flags &= 1
    flags *= np.tile(128 >> np.arange(8), row_bytes).astype(np.uint8)[:, None]
    return np.ascontiguousarray(np.bitwise_or.reduce(flags.reshape(row_bytes, 8, -1), axis=1).T)
