"""The stored projection P·(h − μ) of a hidden state h; computed only here.

It makes the cache small. It is frozen, so it is not the learnable W_ij of MT-BERT (section 3.2), which is applied to
the stored rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

    from kdcache.codecs.base import Basis

Array = TypeVar("Array", np.ndarray, "torch.Tensor")


def coordinates(states: Array, mean: Array, axes: Array) -> Array:
    """``states`` [rows, width] minus ``mean`` [width], times ``axes`` [width, dim], the transpose of P.

    The memory layout of ``axes`` selects the BLAS kernel and so the last bits, which end up in the cache.
    """
    projected: Array = (states - mean) @ axes
    return projected


def project(states: np.ndarray, basis: Basis) -> np.ndarray:
    """P·(h − μ) of ``states`` [rows, width]; the states themselves if the basis has no components."""
    if basis.components is None or basis.mean is None:
        return states
    projected: np.ndarray = coordinates(states, basis.mean, basis.components.T)
    return projected


class Projector:
    """``project`` on a device, for many batches."""

    def __init__(self, basis: Basis, device: torch.device | str) -> None:
        import torch

        self._axes: torch.Tensor | None = None
        if basis.components is not None and basis.mean is not None:
            self._axes = torch.from_numpy(np.ascontiguousarray(basis.components.T)).to(device)
            self._mean = torch.from_numpy(np.ascontiguousarray(basis.mean)).to(device)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, dim] of ``hidden`` [rows, width], both on the device."""
        states = hidden.float()
        return states if self._axes is None else coordinates(states, self._mean, self._axes)

    def back(self, stored: torch.Tensor) -> torch.Tensor:
        """The reconstructed states [rows, width] of ``stored`` [rows, dim]."""
        return stored if self._axes is None else stored @ self._axes.T + self._mean


def leading(basis: Basis, dim: int) -> Basis:
    """A basis of the first ``dim`` coordinates."""
    if basis.components is None:
        return basis
    variance = None if basis.explained_variance is None else basis.explained_variance[:dim]
    return replace(basis, components=np.ascontiguousarray(basis.components[:dim]), explained_variance=variance)


def unprojected(basis: Basis) -> Basis:
    """The basis of a layer that is stored without projection."""
    return replace(basis, components=None, mean=None, explained_variance=None)
