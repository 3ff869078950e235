"""trellis: rows of a chosen number of bytes. Each PCA coordinate gets as many bits as reduce the error most.

    codebook.py   bits and table of each coordinate; packing and decoding with numpy
    fit.py        allots the bits, and trains the tables on the sample
    coder.py      encodes and decodes rows on a device
    viterbi.py    finds the best row on the CPU

docs/decisions/0011 compares the coders that were tried. Manifests call the format ``coded``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kdcache.codecs.base import (
    Basis,
    Decoder,
    HiddenBlock,
    Rounding,
    StorageFormat,
    StoredArray,
    TensorShape,
    largest_of,
)
from kdcache.errors import ModelError

if TYPE_CHECKING:
    import torch

    from kdcache.codecs.base import LayerSpec, OnDevice, OnHost
    from kdcache.codecs.trellis.codebook import Codebook

_MAX_LEVELS = 8 << 8  # entries of the tables of all depths, 1 to 8 bits
_BUDGETS = (8, 16, 32, 48, 96, 192, 384)  # bytes of a row that a plan measures
_MISFIT = 3.0  # times the distortion of the codebook on its sample


def coded_dim(width: int, row_bytes: int) -> int:
    """The most coordinates of a layer of ``width`` that can have a bit in rows of ``row_bytes``."""
    return min(width, 8 * row_bytes)


def codebook_of(basis: Basis) -> Codebook:
    """The codebook in the tensors of a basis."""
    from kdcache.codecs.trellis.codebook import Codebook

    tables = basis.tables
    return Codebook(tables["bits"], tables["scale"], int(tables["window"][0]), tables["levels"])


def tables_of(codebook: Codebook) -> dict[str, np.ndarray]:
    """A codebook as tensors of a basis."""
    window = np.array([codebook.window], dtype=np.uint8)
    return {"bits": codebook.bits, "scale": codebook.scale, "window": window, "levels": codebook.levels}


class Trellis(StorageFormat):
    """A row is a string of bits. Each coordinate is looked up by its own bits and some bits before them."""

    name = "coded"
    by_bytes = True
    coarse = True
    needs_basis = True
    searches = True
    sample_rows = 4096  # tokens on which tables are trained
    basis_bytes = 1 << 24

    @property
    def title(self) -> str:
        return "trellis"

    def arrays(self, spec: LayerSpec, rows: int) -> tuple[StoredArray, ...]:
        return (StoredArray("", (rows, spec.bytes), "uint8"),)

    def dim(self, spec: LayerSpec, basis: Basis | None) -> int:
        assert basis is not None
        return len(basis.tables["bits"])

    def check_keys(self, projection: str | None, row_bytes: int | None) -> None:
        if row_bytes is None:
            raise ValueError('dtype = "trellis" needs bytes: how many a token takes in a layer, for example bytes = 96')
        if projection != "pca":
            raise ValueError(f'dtype = "trellis" needs projection = "pca", not "{projection}"')

    def layer(self, asked: LayerSpec, width: int, where: str) -> LayerSpec:
        if asked.bytes > width:
            raise ModelError(
                f"bytes is {asked.bytes}, but {where} is only {width} wide: the most is a byte per dimension",
                f'Set bytes to at most {width}, or store the layer in dtype = "int8" with projection = "none".',
            )
        return replace(asked, projection="pca", dim=coded_dim(width, asked.bytes))

    def check_layer(self, spec: LayerSpec, width: int) -> None:
        super().check_layer(spec, width)
        if not spec.bytes:
            raise ValueError(f"lacks bytes, which a layer in {self.name} needs")
        if spec.projection != "pca" or spec.dim != coded_dim(width, spec.bytes):
            raise ValueError(f"is in {self.name}, but its projection and dim are not those that its bytes imply")

    def label(self, spec: LayerSpec) -> str:
        return f"{self.title} {spec.bytes}"

    def keys(self, spec: LayerSpec) -> dict[str, str | int]:
        return {"projection": "pca", "dtype": self.title, "bytes": spec.bytes}

    def candidates(self, whole: LayerSpec) -> tuple[LayerSpec, ...]:
        width = whole.dim
        sizes = (size for size in _BUDGETS if size <= width)
        return tuple(replace(whole, projection="pca", dim=coded_dim(width, size), bytes=size) for size in sizes)

    def encode(self, values: np.ndarray, spec: LayerSpec, basis: Basis) -> HiddenBlock:
        import torch

        self.check_storable(largest_of(values))
        return self.encoder(spec, basis, "cpu")(torch.from_numpy(values))

    def encoder_steps(self, spec: LayerSpec, basis: Basis, device: torch.device | str) -> tuple[OnDevice, OnHost]:
        from kdcache.codecs.trellis.coder import Coder

        coder = Coder(codebook_of(basis), spec.bytes, device)
        return lambda values: (coder.on_device(values),), lambda arrays: HiddenBlock(coder.on_host(*arrays))

    def decode(self, block: HiddenBlock, basis: Basis) -> np.ndarray:
        from kdcache.codecs.trellis.codebook import decode_rows

        return decode_rows(block.values, codebook_of(basis))

    def decoder(self, basis: Basis | None) -> Decoder | None:
        from kdcache.codecs.trellis.coder import RowDecoder

        assert basis is not None
        return RowDecoder(codebook_of(basis))

    def finite_rows(self, block: HiddenBlock) -> np.ndarray:
        return np.ones(len(block), np.bool_)  # every byte decodes to numbers of the tables, which are finite

    def rounding(self, block: HiddenBlock, projected: np.ndarray, spec: LayerSpec, basis: Basis) -> Rounding:
        """The error of encoding the live row; the stored row was the best one for its own state."""
        again = self.decode(self.encode(projected, spec, basis), basis)
        own = np.linalg.norm(projected.astype(np.float64) - again, axis=1)
        return Rounding(own, own, noise=2.0, fits=_fits(own, basis))

    def fit(self, basis: Basis, sample: torch.Tensor | None, spec: LayerSpec) -> Basis:
        from kdcache.codecs.trellis.fit import coded_basis

        assert sample is not None
        return coded_basis(basis, sample, spec.bytes)

    def basis_dim(self, spec: LayerSpec, given: Mapping[str, Sequence[int]]) -> int:
        return min(spec.dim, _count(given, "bits"))

    def basis_shapes(self, spec: LayerSpec, given: Mapping[str, Sequence[int]]) -> dict[str, TensorShape]:
        dim, levels = self.basis_dim(spec, given), min(_MAX_LEVELS, _count(given, "levels"))
        return {"bits": ("U8", (dim,)), "scale": ("F32", (dim,)), "levels": ("F32", (levels,)), "window": ("U8", (1,))}

    def check_tables(self, basis: Basis, spec: LayerSpec) -> None:
        from kdcache.codecs.trellis.codebook import check_codebook

        if basis.tables.keys() != {"bits", "scale", "levels", "window"}:
            raise ValueError(f"a layer in {self.name} needs a codebook: bits, scale, levels and window")
        codebook = codebook_of(basis)
        if not 1 <= len(codebook.bits) <= spec.dim:
            raise ValueError(f"bits has {len(codebook.bits)} entries, expected 1 to {spec.dim}")
        check_codebook(codebook, len(codebook.bits), spec.bytes)


def _count(given: Mapping[str, Sequence[int]], name: str) -> int:
    """The length of a one-dimensional tensor in a file; 1 if the file gives anything else."""
    shape = given.get(name, ())
    known = isinstance(shape, list | tuple) and len(shape) == 1 and type(shape[0]) is int
    return max(1, shape[0]) if known else 1


def _fits(own: np.ndarray, basis: Basis) -> bool:
    """Whether encoding live states loses less than their variance, or little more than it lost on the sample."""
    if basis.explained_variance is None or not len(own):
        return True
    variance = float(basis.explained_variance.sum(dtype=np.float64))
    distortion = variance - len(basis.explained_variance) * basis.target_variance  # tables hold means
    return bool(np.square(own).mean() <= max(variance, _MISFIT * distortion))


TRELLIS = Trellis()
