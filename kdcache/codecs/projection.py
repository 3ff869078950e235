"""P·(h − μ): what is stored of a hidden state h. Nowhere else is it computed.

A stored projection cannot be the learnable W_ij of MT-BERT (section 3.2); it makes the cache small, and W_ij sits on
top of what was stored.
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
    """``states`` [rows, width] minus ``mean`` [width], on ``axes`` [width, dim], the transpose of P.

    The last bits depend on how ``axes`` lie in memory, by the routine that multiplies: the bytes of a cache do too.
    """
    found: Array = (states - mean) @ axes
    return found


def project(states: np.ndarray, basis: Basis) -> np.ndarray:
    """P·(h − μ) of ``states`` [rows, width], or the states themselves where the basis has no components."""
    if basis.components is None or basis.mean is None:
        return states
    projected: np.ndarray = coordinates(states, basis.mean, basis.components.T)
    return projected


class Projector:
    """The same on a device, for batch after batch."""

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
        """The state [rows, width] that ``stored`` [rows, dim] stands for."""
        return stored if self._axes is None else stored @ self._axes.T + self._mean


def leading(basis: Basis, dim: int) -> Basis:
    """The first ``dim`` coordinates of a basis."""
    if basis.components is None:
        return basis
    variance = None if basis.explained_variance is None else basis.explained_variance[:dim]
    return replace(basis, components=np.ascontiguousarray(basis.components[:dim]), explained_variance=variance)


def unprojected(basis: Basis) -> Basis:
    """A basis for states that are stored as they are."""
    return replace(basis, components=None, mean=None, explained_variance=None)
