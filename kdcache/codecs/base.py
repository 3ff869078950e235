"""The seam of storage formats: one class per format, and the values that go in and out of it.

A layer of a teacher is stored row by row: P·(h − μ) of a token or of a text (``projection``, ``selection``), encoded by
the layer's format. Everything that depends on the format is asked of its class. No other module compares names of
formats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np

from kdcache.errors import ModelError, NonFiniteError

if TYPE_CHECKING:
    import torch

Projection = Literal["none", "pca", "random"]
TokenSelection = Literal["all", "first", "pooled"]
Encoder = Callable[["torch.Tensor"], "HiddenBlock"]  # of float32 [rows, dim], on the device that it was made for
Decoder = Callable[["torch.Tensor"], "torch.Tensor"]  # stored values [rows, ...] -> float32 [rows, dim], before scales
TensorShape = tuple[str, tuple[int, ...]]  # dtype and shape, as safetensors names them


@dataclass(frozen=True)
class LayerSpec:
    """What is stored of one layer.

    Args:
        projection: what P is; with 'none' the hidden state itself is stored and ``dim`` is the teacher's width.
        dim: coordinates of a row; where the format sets a row's bytes, the most coordinates that can have a bit.
        dtype: name of the storage format, as manifests have it.
        bytes: of a row, where the format is ``by_bytes``; else 0.
        tokens: a row for every token, for the first token of a text, or for the mean of a text's tokens.
    """

    projection: Projection
    dim: int
    dtype: str
    bytes: int = 0
    tokens: TokenSelection = "all"

    @property
    def per_text(self) -> bool:
        """Whether there is one row per text, and no token is needed to read it."""
        return self.tokens != "all"


@dataclass(frozen=True)
class HiddenBlock:
    """Rows of one layer as they are stored: one per token, or per text where the layer is stored so."""

    values: np.ndarray  # [rows, dim or bytes], in the dtype of the format's first array
    scales: np.ndarray | None = None  # float32 [rows], where the format has a scale per row

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: np.ndarray) -> HiddenBlock:
        """The same rows of every array."""
        return HiddenBlock(self.values[rows], None if self.scales is None else self.scales[rows])

    def put(self, rows: np.ndarray, block: HiddenBlock) -> None:
        """Write ``block`` into ``rows`` of every array."""
        self.values[rows] = block.values
        if self.scales is not None:
            self.scales[rows] = block.scales


@dataclass(frozen=True)
class Basis:
    """The frozen projection P and mean μ of one layer.

    What is stored is P·(h − μ). ``components`` is None for 'none'.
    """

    components: np.ndarray | None  # float32[dim, width], rows orthonormal
    mean: np.ndarray | None  # float32[width]
    explained_variance: np.ndarray | None  # float32[dim], variance of the stored coordinates on the sample
    total_variance: float  # mean over the width of the variance of h over the sample's tokens
    target_variance: float  # mean over dim of the variance over tokens of what is stored
    tables: Mapping[str, np.ndarray] = field(
        default_factory=dict
    )  # tensors of the format's own, by their names in the file


class StoredArray(NamedTuple):
    """One array of a layer: what its name adds to the layer's, its shape and its numpy dtype."""

    suffix: str
    shape: tuple[int, ...]
    dtype: str


class Rounding(NamedTuple):
    """What storing takes from each row, as norms, float64 [rows]: the most and the usual.

    ``noise``: times the noise of a live state that may come on top. ``fits``: whether the rows are such as the basis
    was made for.
    """

    most: np.ndarray
    usual: np.ndarray
    noise: float = 1.0
    fits: bool = True


class StorageFormat(ABC):
    """A storage format. What is written here holds for a format that stores each coordinate of its own."""

    name: ClassVar[str]  # in manifests and in resolved recipes
    by_bytes: ClassVar[bool] = False  # whether a row takes the recipe's `bytes`, or what its `dim` needs
    coarse: ClassVar[bool] = False  # whether live targets too go through it: it takes more than rounding away
    needs_basis: ClassVar[bool] = False  # whether rows cannot be decoded without the tensors of the basis
    sample_rows: ClassVar[int] = 0  # hidden states of the sample that ``fit`` is trained on
    basis_bytes: ClassVar[int] = 0  # that the format's own tensors take in a basis at most

    @property
    def title(self) -> str:
        """What people call it. A recipe may say this or ``name``."""
        return self.name

    # shapes and sizes

    @abstractmethod
    def arrays(self, spec: LayerSpec, rows: int) -> tuple[StoredArray, ...]:
        """The arrays of a layer with so many rows: the values, then the scales where there are any."""

    def row_bytes(self, spec: LayerSpec) -> int:
        """Bytes of one row, over all arrays."""
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for _, shape, dtype in self.arrays(spec, 1))

    def empty(self, spec: LayerSpec, rows: int) -> HiddenBlock:
        """A block of so many rows, not yet written."""
        return HiddenBlock(*(np.empty(shape, dtype) for _, shape, dtype in self.arrays(spec, rows)))

    def dim(self, spec: LayerSpec, basis: Basis | None) -> int:
        """Coordinates of a decoded row. ``basis`` may be None unless ``needs_basis``."""
        return spec.dim

    # what a recipe and a manifest may ask for

    def check_keys(self, projection: str | None, row_bytes: int | None) -> None:  # noqa: B027  (most have nothing to refuse)
        """Raises ValueError where a recipe's keys do not go together; ``row_bytes`` is None unless ``by_bytes``."""

    def layer(self, asked: LayerSpec, width: int, where: str) -> LayerSpec:
        """``asked`` for a layer of ``width``, called ``where`` in messages. Raises ModelError where it does not fit."""
        if asked.projection == "none":
            return replace(asked, dim=width, bytes=0)
        if asked.dim > width:
            raise ModelError(
                f"dump.dim is {asked.dim}, but {where} is only {width} wide: a projection cannot add dimensions",
                f'Set dump.dim to at most {width}, or dump.projection = "none" to store the layer as it is.',
            )
        return replace(asked, bytes=0)

    def check_layer(self, spec: LayerSpec, width: int) -> None:
        """Raises ValueError where a manifest's layer of a teacher of ``width`` contradicts itself."""
        if spec.projection == "none" and spec.dim != width:
            raise ValueError("has not the teacher's width")
        if spec.dim > width:
            raise ValueError(f"has dim {spec.dim} beyond the width {width}")
        if spec.bytes and not self.by_bytes:
            raise ValueError(f"has bytes, which do not belong to {self.name}")

    # names, and what a plan looks at

    def label(self, spec: LayerSpec) -> str:
        """In a few words, for tables: ``pca 128 int8``."""
        return f"{spec.projection} {spec.dim} {self.title}"

    def keys(self, spec: LayerSpec) -> dict[str, str | int]:
        """The recipe keys that ask for it."""
        dim = {} if spec.projection == "none" else {"dim": spec.dim}
        return {"projection": spec.projection, "dtype": self.title, **dim}

    def candidates(self, whole: LayerSpec) -> tuple[LayerSpec, ...]:
        """What a plan measures for a layer that is ``whole`` at full width.

        That alone where a format says nothing else.
        """
        return (whole,)

    # encoding

    def unstorable(self, largest: np.ndarray) -> tuple[int, str] | None:
        """The first row that cannot be stored, and why.

        ``largest`` [rows]: the absolute values' maxima, NaN where one is NaN.
        """
        finite = np.isfinite(largest)
        return None if finite.all() else (int(np.argmin(finite)), "NaN or infinity")

    @property
    def cure(self) -> str:
        """The hint that goes with a row that cannot be stored."""
        return 'The teacher is at fault: check that its training did not diverge, or set dump.precision = "float32".'

    def check_storable(self, largest: np.ndarray) -> None:
        """Raises NonFiniteError with the number of the first row that cannot be stored; see ``unstorable``."""
        found = self.unstorable(largest)
        if found is not None:
            raise NonFiniteError(f"token {found[0]}: {found[1]}", self.cure)

    @abstractmethod
    def encode(self, values: np.ndarray, spec: LayerSpec, basis: Basis) -> HiddenBlock:
        """``values`` float32 [rows, dim], as they are stored. Raises NonFiniteError as ``check_storable``."""

    @abstractmethod
    def encoder(self, spec: LayerSpec, basis: Basis, device: torch.device | str) -> Encoder:
        """The same on a device, for rows that can be stored; bit for bit what ``encode`` gives."""

    # decoding

    def decode(self, block: HiddenBlock, basis: Basis) -> np.ndarray:
        """float32 [rows, dim] of a stored block."""
        values: np.ndarray = block.values.astype(np.float32)
        if block.scales is not None:
            values *= block.scales[:, None]
        return values

    def decoder(self, basis: Basis | None) -> Decoder | None:
        """Decodes values on a device; None where they are numbers already. Scales are applied by the caller."""
        return None

    # what must hold of what is stored

    def check_block(self, block: HiddenBlock, spec: LayerSpec, rows: int) -> None:
        """Raises ValueError where dtypes and shapes are not those of ``arrays``, or a code has no value."""
        given = [array for array in (block.values, block.scales) if array is not None]
        arrays = self.arrays(spec, rows)
        if len(given) != len(arrays):
            raise ValueError(f"a block in {self.name} has {len(arrays)} arrays (values, scales), not {len(given)}")
        for array, (suffix, shape, dtype) in zip(given, arrays, strict=True):
            if array.shape != shape or array.dtype != np.dtype(dtype):
                name = f"array '{suffix}' is " if suffix else "is "
                raise ValueError(f"{name}{array.dtype}{list(array.shape)}, expected {dtype}{list(shape)}")

    def finite_rows(self, block: HiddenBlock) -> np.ndarray:
        """Bool [rows]: whether a row decodes to finite values."""
        finite: np.ndarray = (
            np.isfinite(block.values) if block.scales is None else np.isfinite(block.scales[:, None])
        ).all(axis=1)
        return finite

    @abstractmethod
    def rounding(self, block: HiddenBlock, projected: np.ndarray, spec: LayerSpec, basis: Basis) -> Rounding:
        """What storing takes from rows, by which an audit judges.

        ``projected`` float32 [rows, dim] are P·(h − μ) of live states.
        """

    # the basis

    def fit(self, basis: Basis, sample: torch.Tensor | None, spec: LayerSpec) -> Basis:
        """``basis`` with the format's own tensors, trained on hidden states ``sample`` [rows, width] of ``sample_rows``
        rows.
        """
        return basis

    def basis_dim(self, spec: LayerSpec, given: Mapping[str, Sequence[int]]) -> int:
        """Rows of P in a basis file whose tensors have the shapes ``given``."""
        return spec.dim

    def basis_shapes(self, spec: LayerSpec, given: Mapping[str, Sequence[int]]) -> dict[str, TensorShape]:
        """The format's own tensors in a basis file, all of them required.

        What the format leaves open is as ``given``, in bounds.
        """
        return {}

    def check_tables(self, basis: Basis, spec: LayerSpec) -> None:
        """Raises ValueError where a basis does not have exactly the format's own tensors, with values that can be."""
        if basis.tables:
            raise ValueError(f"a layer in {self.name} has no tensors {', '.join(sorted(basis.tables))}")


def largest_of(values: np.ndarray) -> np.ndarray:
    """The largest absolute value of each row of ``values`` [rows, dim], NaN where one is NaN."""
    found: np.ndarray = np.abs(values).max(axis=1, initial=0.0)
    return found


def largest_on_device(values: torch.Tensor) -> np.ndarray:
    """The same of a tensor on a device."""
    found: np.ndarray = values.abs().amax(dim=1).cpu().numpy()
    return found
