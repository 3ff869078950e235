"""What is gathered of a layer over the sample of texts, and the basis that comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.dump.codebooks import SAMPLE_ROWS, fit_coded_basis
from kdcache.dump.projection import Moments, fit_basis

if TYPE_CHECKING:
    from kdcache.cache.blocks import Basis
    from kdcache.cache.spec import LayerSpec


class LayerFit:
    """One layer of a teacher while its sample is run; ``rows`` is how many there will be, of which a seeded choice is kept."""

    def __init__(self, spec: LayerSpec, width: int, rows: int, seed: int) -> None:
        self._spec = spec
        self._seed = seed
        self.moments = Moments(width, cross=spec.projection != "none")
        self._wanted = _chosen(rows, seed) if spec.dtype == "coded" else np.zeros(rows, np.bool_)
        self._kept: list[torch.Tensor] = []

    def add(self, hidden: torch.Tensor, places: np.ndarray) -> None:
        """Take in ``hidden`` [rows, width], rows ``places`` of the sample."""
        self.moments.add(hidden)
        mine = self._wanted[places]
        if mine.any():
            self._kept.append(hidden[torch.from_numpy(mine).to(hidden.device)].clone())

    def kept(self) -> torch.Tensor:
        """[rows, width]: the rows on which tables are trained."""
        return torch.cat(self._kept)

    def basis(self, *, name: str, layer: int) -> Basis:
        """The basis of layer ``layer`` of teacher ``name``; NonFiniteError where the sample was not finite."""
        spec = self._spec
        if spec.dtype == "coded":
            return fit_coded_basis(self.moments, self.kept(), spec.bytes, name=name, layer=layer)
        return fit_basis(self.moments, spec.projection, spec.dim, seed=self._seed, name=name, layer=layer)


def _chosen(rows: int, seed: int) -> np.ndarray:
    """Which of ``rows`` to keep, as bool [rows]: ``SAMPLE_ROWS`` of them, or all; raw numbers of the generator, which numpy promises to keep."""
    chosen = np.zeros(rows, np.bool_)
    chosen[np.argsort(np.random.PCG64(seed).random_raw(rows), kind="stable")[:SAMPLE_ROWS]] = True
    return chosen
