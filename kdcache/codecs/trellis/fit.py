"""Fits the codebook of a layer on the sample, like the basis: the bits of each coordinate, and the tables.

PCA to few dimensions drops information, and int8 then stores the rest more exactly than needed. Here each coordinate of
the PCA basis gets as many bits as reduce the error most (reverse water-filling: the next bit goes to the coordinate
whose distortion it reduces most). The tables are trained by Lloyd's rule. docs/decisions/0011 compares the coders that
were tried.
"""

from __future__ import annotations

import heapq
from statistics import NormalDist

import numpy as np
import torch

from kdcache.codecs.base import Basis
from kdcache.codecs.projection import coordinates
from kdcache.codecs.trellis import tables_of
from kdcache.codecs.trellis.codebook import MAX_BITS, Codebook, decode_rows, table_sizes
from kdcache.codecs.trellis.coder import Coder, best_windows

WINDOW = 6  # bits of a look-up
ROUNDS = 5  # of training; the distortion on unseen rows hardly changes after the third

# distortion of a Gaussian of variance 1 at 0 to 8 bits: python benchmarks/coding.py --gaussian
DISTORTION = (1.0, 0.310, 0.0903, 0.0254, 0.0075, 0.0021, 0.00065, 0.00017, 0.000043)
# standard deviation of the Gaussian whose quantiles are the first tables: with many levels the best ones follow the
# cube root of the density, which is sqrt(3) times as wide; training from a narrower start needs many rounds
_SPREAD = (1.0, 1.0, 1.0, 1.25, 1.5, 1.5, 3**0.5, 3**0.5, 3**0.5)


def allot_bits(variance: np.ndarray, budget: int) -> np.ndarray:
    """Divide ``budget`` bits: each bit goes to the coordinate whose distortion it reduces most. Returns uint8 [dim].

    A coordinate gets at most 8 bits. Its distortion at b bits is variance * DISTORTION[b]. Ties go to the earlier one.
    """
    bits = np.zeros(len(variance), dtype=np.uint8)
    gains = [(-value * (DISTORTION[0] - DISTORTION[1]), place) for place, value in enumerate(variance.tolist())]
    heapq.heapify(gains)
    for _ in range(min(budget, MAX_BITS * len(bits))):
        _, place = heapq.heappop(gains)
        bits[place] += 1
        if bits[place] < MAX_BITS:
            have = int(bits[place])
            heapq.heappush(gains, (-float(variance[place]) * (DISTORTION[have] - DISTORTION[have + 1]), place))
    return bits


def coded_basis(whole: Basis, sample: torch.Tensor, row_bytes: int) -> Basis:
    """Basis and codebook of a layer: the leading PCA coordinates, those with at least one bit.

    ``whole``: a PCA basis of at least as many dimensions as can have a bit. Tables are trained on the hidden states
    ``sample`` [rows, width], on their device.
    """
    assert whole.components is not None and whole.mean is not None and whole.explained_variance is not None
    bits = allot_bits(whole.explained_variance.astype(np.float64), 8 * row_bytes)
    dim = int((bits > 0).sum())
    components, variance = np.ascontiguousarray(whole.components[:dim]), whole.explained_variance[:dim]
    axes = torch.from_numpy(components).T  # a view, since the tables of a cache depend on the memory layout
    mean = torch.from_numpy(whole.mean)
    points = coordinates(sample.float(), mean.to(sample.device), axes.to(sample.device))
    codebook = train_codebook(points, bits[:dim], np.sqrt(variance))
    stored = decode_rows(Coder(codebook, row_bytes, sample.device)(points), codebook)
    target = float(stored.astype(np.float64).var(axis=0).mean()) if len(stored) else 0.0
    return Basis(components, whole.mean, variance, whole.total_variance, target, tables_of(codebook))


def train_codebook(
    points: torch.Tensor, bits: np.ndarray, scale: np.ndarray, *, window: int = WINDOW, rounds: int = ROUNDS
) -> Codebook:
    """Train the tables for ``bits`` uint8 [dim] (1 to 8) on ``points`` [n, dim]; coordinates of equal depth share one.

    Each round encodes the sample, and moves every entry to the mean of the values that were encoded by it. Values are
    in units of the ``scale`` of their coordinate and weighted by its square, so that the distortion of a row decreases.
    An entry with few values stays.
    """
    tables = {depth: _first_table(depth, window) for depth in table_sizes(bits, window)}
    scale = scale.astype(np.float32)
    weight = scale.astype(np.float64) ** 2
    units = points.double().cpu().numpy() / np.where(scale > 0, scale, 1.0)
    for _ in range(rounds if len(points) else 0):
        levels = [
            torch.from_numpy(tables[depth] * factor).to(points.device)
            for depth, factor in zip(bits.tolist(), scale, strict=True)
        ]
        chosen = best_windows(points, levels, bits.tolist(), window).cpu().numpy()
        for depth, table in tables.items():
            mine = bits == depth
            entries = chosen[:, mine].ravel()
            each = np.broadcast_to(weight[mine], chosen[:, mine].shape).ravel()
            mass = np.bincount(entries, each, len(table))
            total = np.bincount(entries, each * units[:, mine].ravel(), len(table))
            known = (np.bincount(entries, minlength=len(table)) > 3) & (mass > 0)
            tables[depth] = np.where(known, total / np.where(known, mass, 1.0), table).astype(np.float32)
    return Codebook(bits.astype(np.uint8), scale, window, np.concatenate([tables[depth] for depth in sorted(tables)]))


def _first_table(depth: int, window: int) -> np.ndarray:
    """Quantiles of a Gaussian: entries with equal earlier bits cover all of it, shifted by an amount of these bits."""
    before, own = max(0, window - depth), 1 << depth
    quantile = NormalDist().inv_cdf
    table = np.empty((1 << before, own), dtype=np.float32)
    for prefix in range(1 << before):
        shift = (_reversed(prefix, before) + 0.5) / (1 << before)
        order = _scrambled(own, prefix)
        for place in range(own):
            table[prefix, order[place]] = _SPREAD[depth] * quantile((place + shift) / own)
    return table.reshape(-1)


def _reversed(number: int, bits: int) -> int:
    return int(f"{number:0{bits}b}"[::-1], 2) if bits else 0


def _scrambled(count: int, seed: int) -> list[int]:
    """The numbers below ``count`` in an order that depends on the seed, so that equal bits mean different values."""
    keys = np.random.PCG64([seed, count]).random_raw(count)
    order: list[int] = np.argsort(keys, kind="stable").tolist()
    return order
