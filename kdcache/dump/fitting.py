"""The frozen bases, fitted on a sample of texts: P and μ of ``codecs.projection``, and tables of storage formats.

Bases are fitted in float64 on a seeded sample, from moments that are summed batch by batch, so memory does not grow
with the sample. Every basis has the variance of its target: the hidden loss is divided by it, which makes the losses of
two teachers comparable.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.codecs.base import Basis
from kdcache.codecs.registry import format_of
from kdcache.errors import NonFiniteError

if TYPE_CHECKING:
    from kdcache.codecs.base import LayerSpec


class Moments:
    """Mean and scatter matrix of a stream of token vectors, in float64; merged batch by batch (Chan et al. 1979).

    Without ``cross``, only variances per dimension are kept: ``scatter`` is [width] instead of [width, width].
    """

    def __init__(self, width: int, *, cross: bool) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width) if cross else width)
        self._cross = cross

    def add(self, tokens: torch.Tensor) -> None:
        """Add ``tokens`` [tokens, width] of any float dtype, on any device."""
        if not len(tokens):
            return
        x = tokens.to(torch.float64) if tokens.device.type != "mps" else tokens.cpu().to(torch.float64)
        mean = x.mean(dim=0)
        x = x - mean
        scatter = (x.T @ x if self._cross else (x * x).sum(dim=0)).cpu().numpy()
        delta = mean.cpu().numpy() - self.mean
        total = self.count + len(tokens)
        between = np.outer(delta, delta) if self._cross else delta * delta
        self.scatter += scatter + between * (self.count * len(tokens) / total)
        self.mean += delta * (len(tokens) / total)
        self.count = total

    def covariance(self) -> np.ndarray:
        """The scatter divided by the number of tokens, [width, width] or, without ``cross``, [width]."""
        return self.scatter / max(self.count, 1)


def fit_basis(moments: Moments, projection: str, dim: int, *, seed: int, name: str, layer: int) -> Basis:
    """The basis of one layer from the moments of its sample.

    'pca': the ``dim`` leading eigenvectors of the covariance, each with its largest entry positive. 'random':
    orthonormal rows from a generator seeded by (seed, name, layer), not scaled, because the loss is divided by the
    target variance. 'none': no components, h itself is stored. Variances are over the tokens of the sample:
    ``total_variance`` is their mean over the width of the layer, ``target_variance`` over the stored dimensions. Raises
    NonFiniteError if the sample is not finite.
    """
    covariance = moments.covariance()
    if not np.isfinite(covariance).all():
        raise NonFiniteError(f"teacher '{name}', layer {layer}: hidden states of the sample are not finite")
    if projection == "none":
        variance = float(covariance.mean())
        return Basis(None, None, None, variance, variance)
    components = (
        _leading_eigenvectors(covariance, dim)
        if projection == "pca"
        else _orthonormal_rows(dim, len(covariance), seed, name, layer)
    )
    variance = np.einsum("ij,jk,ik->i", components, covariance, components, optimize=True).clip(min=0.0)
    return Basis(
        components.astype(np.float32),
        moments.mean.astype(np.float32),
        variance.astype(np.float32),
        float(np.trace(covariance)) / len(covariance),
        float(variance.mean()),
    )


def _leading_eigenvectors(covariance: np.ndarray, dim: int) -> np.ndarray:
    _, vectors = np.linalg.eigh(covariance)  # rising eigenvalues, vectors in columns
    rows = np.ascontiguousarray(vectors[:, ::-1][:, :dim].T)
    largest = rows[np.arange(dim), np.abs(rows).argmax(axis=1)]
    return rows * np.where(largest < 0, -1.0, 1.0)[:, None]


def _orthonormal_rows(dim: int, width: int, seed: int, name: str, layer: int) -> np.ndarray:
    digest = hashlib.blake2b(f"{seed}/{name}/{layer}".encode(), digest_size=8).digest()
    gaussian = np.random.default_rng(int.from_bytes(digest, "little")).standard_normal((width, dim))
    q, r = np.linalg.qr(gaussian)
    return np.ascontiguousarray((q * np.where(np.diag(r) < 0, -1.0, 1.0)).T)


class Sample:
    """One layer over the sample: its moments, and ``keep`` of its ``rows`` rows, chosen by ``seed``."""

    def __init__(self, width: int, rows: int, seed: int, *, cross: bool, keep: int) -> None:
        self.moments = Moments(width, cross=cross)
        self._wanted = _chosen(rows, keep, seed)
        self._kept: list[torch.Tensor] = []

    def add(self, hidden: torch.Tensor, places: np.ndarray) -> None:
        """Add ``hidden`` [rows, width], which are rows ``places`` of the sample."""
        self.moments.add(hidden)
        mine = self._wanted[places]
        if mine.any():
            self._kept.append(hidden[torch.from_numpy(mine).to(hidden.device)].clone())

    def kept(self) -> torch.Tensor | None:
        """The kept rows [rows, width], or None."""
        return torch.cat(self._kept) if self._kept else None


class LayerFit(Sample):
    """One layer of a teacher while it runs over a sample with ``rows`` rows."""

    def __init__(self, spec: LayerSpec, width: int, rows: int, seed: int) -> None:
        super().__init__(width, rows, seed, cross=spec.projection != "none", keep=format_of(spec).sample_rows)
        self._spec, self._seed = spec, seed

    def basis(self, *, name: str, layer: int) -> Basis:
        """The basis of layer ``layer`` of teacher ``name``; NonFiniteError if the sample is not finite."""
        spec = self._spec
        basis = fit_basis(self.moments, spec.projection, spec.dim, seed=self._seed, name=name, layer=layer)
        return format_of(spec).fit(basis, self.kept(), spec)


def _chosen(rows: int, count: int, seed: int) -> np.ndarray:
    """Mask [rows] with at most ``count`` True, from the raw generator, whose output numpy keeps stable."""
    chosen = np.zeros(rows, np.bool_)
    chosen[np.argsort(np.random.PCG64(seed).random_raw(rows), kind="stable")[:count]] = True
    return chosen
