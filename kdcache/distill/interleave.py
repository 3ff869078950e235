"""What is known of a text or a token side by side, a teacher's layers above all, as a batch wants it.

A cache keeps each layer in an array of its own, so that one can be read or pulled alone. A batch wants all layers of a few
tokens: interleaved they are one piece of memory per row instead of one per row, layer and scale, and copying many small
pieces is what a loader spends its time on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from kdcache.codecs.base import HiddenBlock


@dataclass(frozen=True, eq=False)
class Interleaved:
    """Records of several fields as bytes, uint8 [T, record]; ``dtype`` says which bytes of a record are what."""

    rows: np.ndarray
    dtype: np.dtype

    @classmethod
    def of(cls, fields: Mapping[str, np.ndarray]) -> Interleaved:
        """From arrays with the same number of rows. One alone is not copied."""
        dtype = np.dtype([(name, array.dtype, array.shape[1:]) for name, array in fields.items()], align=True)
        count = len(next(iter(fields.values())))
        if len(fields) == 1:
            (array,) = fields.values()
            return cls(np.ascontiguousarray(array).view(np.uint8).reshape(count, dtype.itemsize), dtype)
        mixed = np.empty(count, dtype)
        for name, array in fields.items():
            mixed[name] = array
        return cls(mixed.view(np.uint8).reshape(count, dtype.itemsize), dtype)

    @classmethod
    def of_layers(cls, blocks: Mapping[int, HiddenBlock]) -> Interleaved:
        """From blocks by layer, all with the same number of rows; see ``layers_of``."""
        return cls.of({name: array for layer, block in blocks.items() for name, array in _fields(layer, block)})

    @property
    def bytes(self) -> memoryview:
        """All of it as one piece of memory."""
        return self.rows.reshape(-1).data


JOINED_BYTES = 1 << 20  # of a batch; about 80 us of copying


def joined(parts: Sequence[memoryview], spans: Sequence[tuple[int, int, int]], count: int, size: int) -> np.ndarray:
    """Records uint8 [count, size] out of several parts, one span after the other: ``spans`` are (part, first byte, last byte + 1).

    For short spans joining bytes is cheaper than joining arrays; but it keeps the interpreter to itself, so what takes long enough to
    copy for another thread to run meanwhile (more than ``JOINED_BYTES``) is joined as arrays, which let go of it.
    """
    pieces = [parts[part][start:end] for part, start, end in spans]
    if count * size > JOINED_BYTES:
        return np.concatenate([np.asarray(piece) for piece in pieces]).reshape(count, size)
    return np.frombuffer(bytearray().join(pieces), np.uint8).reshape(count, size)


def fields_of(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Records uint8 [n, record] as a structured array [n]: a view."""
    return rows.reshape(-1).view(dtype)


def _fields(layer: int, block: HiddenBlock) -> list[tuple[str, np.ndarray]]:
    values, scales = (f"values {layer}", block.values), (f"scales {layer}", block.scales)
    return [values] if scales[1] is None else [values, (scales[0], scales[1])]


def layers_of(rows: np.ndarray, dtype: np.dtype) -> dict[int, tuple[torch.Tensor, torch.Tensor | None]]:
    """Values [n, dim] and scales [n] of each layer in ``rows`` uint8 [n, row]: views, nothing is copied."""
    table = fields_of(rows, dtype)
    return {
        layer: (torch.from_numpy(table[values]), None if scales is None else torch.from_numpy(table[scales]))
        for layer, values, scales in _names(dtype)
    }


@functools.lru_cache
def _names(dtype: np.dtype) -> list[tuple[int, str, str | None]]:
    """Per layer, the names of its values and of its scales, if it has any."""
    layers = [int(name.split()[1]) for name in dtype.names or () if name.startswith("values")]
    return [
        (layer, f"values {layer}", f"scales {layer}" if f"scales {layer}" in (dtype.names or ()) else None) for layer in layers
    ]
