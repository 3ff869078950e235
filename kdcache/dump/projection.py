"""The frozen bases: what is stored of a hidden state h is P·(h − μ).

A stored projection cannot be the learnable W_ij of MT-BERT (section 3.2); it makes the cache small, and W_ij sits on top of
what was stored. Bases are fitted in float64 on a seeded sample of the texts, from moments that are added up batch by batch,
so that memory does not grow with the sample. Every layer also gets the variance of its target, by which the hidden loss is
divided: without it, losses of two teachers are not comparable.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.blocks import Basis
from kdcache.errors import ModelError, NonFiniteError

if TYPE_CHECKING:
    import torch


class Moments:
    """Mean and scatter matrix of a stream of token vectors, in float64; merged batch by batch (Chan et al. 1979).

    ``cross`` is False where only variances per dimension are wanted: then ``scatter`` is [width], else [width, width].
    """

    def __init__(self, width: int, *, cross: bool) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width) if cross else width)
        self._cross = cross

    def add(self, tokens: torch.Tensor) -> None:
        """Take in ``tokens`` [tokens, width] of any float type, on any device that knows float64."""
        import torch

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
        """[width, width] (or [width] without ``cross``): the scatter divided by the number of tokens."""
        return self.scatter / max(self.count, 1)


def check_dim(projection: str, dim: int, width: int, name: str, layer: int) -> int:
    """The stored dimension of a layer: ``width`` without a projection, else ``dim``; ModelError where dim > width."""
    if projection == "none":
        return width
    if dim > width:
        raise ModelError(
            f"dump.dim is {dim}, but layer {layer} of teacher '{name}' is only {width} wide: a projection cannot add dimensions",
            f'Set dump.dim to at most {width}, or dump.projection = "none" to store the layer as it is.',
        )
    return dim


def fit_basis(moments: Moments, projection: str, dim: int, *, seed: int, name: str, layer: int) -> Basis:
    """The basis of one layer from the moments of its sample.

    'pca': the ``dim`` leading eigenvectors of the covariance, each turned so that its largest entry is positive.
    'random': orthonormal rows from a generator seeded by (seed, name, layer); not scaled, since the stored target variance
    makes the scale immaterial. 'none': no components, h is stored as it is.
    Variances are over the tokens of the sample: ``total_variance`` is their mean over the width of the layer,
    ``target_variance`` their mean over the stored dimensions.
    Raises NonFiniteError where the sample was not finite.
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


class Projector:
    """P·(h − μ) on the device, for the batches of a dump; h itself where the basis has no components."""

    def __init__(self, basis: Basis, device: torch.device | str) -> None:
        import torch

        self._components: torch.Tensor | None = None
        if basis.components is not None and basis.mean is not None:
            self._components = torch.from_numpy(np.ascontiguousarray(basis.components.T)).to(device)
            self._mean = torch.from_numpy(np.ascontiguousarray(basis.mean)).to(device)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [tokens, dim] of ``hidden`` [tokens, width], both on the device."""
        projected = hidden.float()
        if self._components is not None:
            projected = (projected - self._mean) @ self._components
        return projected
