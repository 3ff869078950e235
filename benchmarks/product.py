"""Product quantisation with 256 centroids per piece of a state: the reference for hidden states in trellis."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

KMEANS_ROWS, KMEANS_ROUNDS = 16384, 8
CENTROIDS = 256

Rows = TypeVar("Rows", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class ProductQuantiser:
    """A row has a byte per piece of the state; ``tables`` [256, width of the piece] are the centroids."""

    pieces: Sequence[slice]
    tables: Sequence[torch.Tensor]

    @staticmethod
    def trained(states: torch.Tensor, size: int) -> ProductQuantiser:
        """Train a quantiser for rows of ``size`` bytes by k-means on some rows of ``states`` [rows, width]."""
        edges = np.linspace(0, states.shape[1], size + 1).round().astype(int).tolist()
        pieces = [slice(first, last) for first, last in itertools.pairwise(edges)]
        sample = some(states, KMEANS_ROWS)
        return ProductQuantiser(pieces, [kmeans(sample[:, piece].contiguous()) for piece in pieces])

    def encode(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Encode: int64 [rows] for each piece."""
        return [nearest(states[:, piece], table) for piece, table in zip(self.pieces, self.tables, strict=True)]

    def decode(self, codes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Decode to float32 [rows, width]."""
        return torch.cat([table[code] for table, code in zip(self.tables, codes, strict=True)], dim=1)

    def rebuild(self, states: torch.Tensor) -> torch.Tensor:
        """``states`` encoded and decoded, some thousand rows at a time."""
        return torch.cat([self.decode(self.encode(rows)) for rows in states.split(8192)])


def some(array: Rows, count: int) -> Rows:
    """``count`` seeded rows, or all rows if there are fewer."""
    return array[np.sort(np.argsort(np.random.PCG64(1).random_raw(len(array)), kind="stable")[:count])]


def kmeans(points: torch.Tensor) -> torch.Tensor:
    """Centroids [256, width]; one per point if there are fewer points."""
    centres = points[:: max(1, len(points) // CENTROIDS)][:CENTROIDS].clone()
    for _ in range(KMEANS_ROUNDS):
        owner = nearest(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        counts = torch.bincount(owner, minlength=len(centres))
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres


def nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The index of the closest centre of each point, int64 [points]."""
    return (centres.square().sum(dim=1) - 2 * points @ centres.T).argmin(dim=1)
