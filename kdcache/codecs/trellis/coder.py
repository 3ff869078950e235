"""Encodes coordinates to rows of bits on the teacher's device, and decodes them on the student's device.

In a trellis code the value of a coordinate depends on its own bits and on bits before it. So the best string is found
by dynamic programming over the coordinates (Viterbi), for all tokens of a block at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kdcache.codecs.trellis.codebook import Codebook, pack_windows, places
from kdcache.codecs.trellis.viterbi import Viterbi

if TYPE_CHECKING:
    from collections.abc import Sequence

_COSTS_BYTES = 2 << 30  # of a block of tokens: large blocks hide the launch times of GPU kernels
_NEVER = 1e30


class Coder:
    """Encodes coordinates [n, dim] to uint8 rows [n, bytes] with a codebook."""

    def __init__(self, codebook: Codebook, row_bytes: int, device: torch.device | str) -> None:
        self._bits = codebook.bits.tolist()
        self._row_bytes = row_bytes
        scales = codebook.scale.tolist()
        tables = {depth: torch.from_numpy(table.copy()).to(device) for depth, table in codebook.tables.items()}
        self._levels = [tables[depth] * scale for depth, scale in zip(self._bits, scales, strict=True)]
        self._codebook = codebook
        self._viterbi = (
            Viterbi(self._levels, self._bits, codebook.window) if torch.device(device).type == "cpu" else None
        )

    def __call__(self, coordinates: Tensor) -> np.ndarray:
        """The rows with the least squared error from ``coordinates`` (float32, finite)."""
        return self.on_host(self.on_device(coordinates).cpu().numpy())

    def on_device(self, coordinates: Tensor) -> Tensor:
        """The first step: on a GPU the search, uint8 [dim, n]; on the CPU nothing but float32 [n, dim]."""
        if self._viterbi is not None:
            return coordinates.float()
        return search_on_device(coordinates, self._levels, self._bits, self._codebook.window).T.to(torch.uint8)

    def on_host(self, found: np.ndarray) -> np.ndarray:
        """The second step: what ``on_device`` gave to rows of bits; on the CPU with the search."""
        if self._viterbi is not None:
            found = self._viterbi.windows_of(torch.from_numpy(found))
        return pack_windows(found, self._codebook.bits, self._row_bytes)


class RowDecoder:
    """Decodes rows of a layer in trellis on the device of the rows, all coordinates at once."""

    def __init__(self, codebook: Codebook) -> None:
        where = places(codebook)
        arrays = {"byte": where.byte, "shift": where.shift, "mask": where.mask, "first": where.first}
        tensors = {name: torch.from_numpy(array).to(torch.int32) for name, array in arrays.items()}
        tensors |= {
            "levels": torch.from_numpy(codebook.levels.copy()),
            "scale": torch.from_numpy(codebook.scale.copy()),
        }
        self.dim = len(codebook.bits)
        self._on: dict[torch.device, dict[str, Tensor]] = {torch.device("cpu"): tensors}

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 [n, dim] of ``rows`` uint8 [n, bytes]."""
        if rows.device not in self._on:
            here = self._on[torch.device("cpu")]
            self._on[rows.device] = {name: tensor.to(rows.device) for name, tensor in here.items()}
        of = self._on[rows.device]
        padded = torch.nn.functional.pad(rows, (1, 1)).to(torch.int32)
        words = (padded[:, :-1] << 8) | padded[:, 1:]
        entries = (
            words.index_select(1, of["byte"])
            .bitwise_right_shift_(of["shift"])
            .bitwise_and_(of["mask"])
            .add_(of["first"])
        )
        return of["levels"].index_select(0, entries.view(-1)).view(entries.shape).mul_(of["scale"])


def best_windows(coordinates: Tensor, levels: Sequence[Tensor], bits: Sequence[int], window: int) -> Tensor:
    """Entries int64 [n, dim] of the tables, with the least sum of squared errors of a row.

    Neighbouring entries agree on the bits that they share. ``levels``: the table [2 ** max(window, bits)] of each
    coordinate.
    """
    if coordinates.device.type == "cpu":
        return torch.from_numpy(Viterbi(levels, bits, window).windows_of(coordinates.float()).T.astype(np.int64))
    return search_on_device(coordinates, levels, bits, window)


def search_on_device(coordinates: Tensor, levels: Sequence[Tensor], bits: Sequence[int], window: int) -> Tensor:
    """``best_windows`` in few large operations, as a GPU needs them."""
    block = min(max(_COSTS_BYTES // (4 * sum(len(table) for table in levels)), 64), 8192)
    pieces = [_search(piece.T.contiguous(), levels, bits, window) for piece in coordinates.float().split(block)]
    return torch.cat(pieces) if pieces else torch.empty(0, len(bits), dtype=torch.int64, device=coordinates.device)


def _search(columns: Tensor, levels: Sequence[Tensor], bits: Sequence[int], window: int) -> Tensor:
    """``best_windows`` of ``columns`` [dim, n], in two passes over the coordinates.

    ``costs[d]`` [entries, n]: the least error of coordinates 0 to d, if d has that entry, up to a constant per token.
    """
    tokens = columns.shape[1]
    before = columns.new_full((1 << window, tokens), _NEVER)
    before[0] = 0.0  # the bits before a row are zeros
    costs = [before]
    for column, table, depth in zip(columns, levels, bits, strict=True):
        shared = 1 << (max(window, depth) - depth)  # values of the bits of earlier coordinates
        best = costs[-1].view(-1, shared, tokens).amin(0)
        best = best - best.amin(0)  # keeps the sums small, where float32 has a high resolution
        cost = (table * table).view(shared, -1, 1) + best[:, None]
        costs.append(cost.view(-1, tokens).addcmul_(table[:, None], column[None], value=-2.0))
    entries = torch.empty(len(bits), tokens, dtype=torch.int64, device=columns.device)
    entry = costs[-1].argmin(0)
    for place in range(len(bits) - 1, -1, -1):
        entries[place] = entry
        shared = 1 << (max(window, bits[place]) - bits[place])
        prefix = entry >> bits[place]
        rows = torch.arange(0, len(costs[place]), shared, device=columns.device)[:, None] + prefix
        entry = costs[place].gather(0, rows).argmin(0) * shared + prefix
    return entries.T
