"""The seam of storage formats: one class per format, and the values that it encodes and decodes.

A layer of a teacher is stored row by row: P·(h − μ) of a token or a text (``projection``, ``token_selection``), encoded
by the layer's format. Everything that depends on the format is a method of its class. No other module compares names
of formats.
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
OnDevice = Callable[
    ["torch.Tensor"], "tuple[torch.Tensor, ...]"
]  # of float32 [rows, dim]; does not wait for the device
OnHost = Callable[["Sequence[np.ndarray]"], "HiddenBlock"]
Decoder = Callable[["torch.Tensor"], "torch.Tensor"]  # stored values [rows, ...] -> float32 [rows, dim], before scales
TensorShape = tuple[str, tuple[int, ...]]  # dtype and shape, as safetensors names them


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is stored.

    Args:
        projection: Kind of P; with 'none' the hidden state itself is stored and ``dim`` is the teacher's width.
        dim: Coordinates of a row; if the format is ``by_bytes``, the most coordinates that can have a bit.
        dtype: Name of the storage format in manifests.
        bytes: Bytes of a row if the format is ``by_bytes``, else 0.
        tokens: One row per token, for the first token of a text, or for the mean of a text's tokens.
    """

    projection: Projection
    dim: int
    dtype: str
    bytes: int = 0
    tokens: TokenSelection = "all"

    @property
    def per_text(self) -> bool:
        """Whether there is one row per text, which can be read without tokens."""
        return self.tokens != "all"


@dataclass(frozen=True)
class HiddenBlock:
    """Stored rows of one layer: one per token, or per text if ``LayerSpec.per_text``."""

    values: np.ndarray  # [rows, dim or bytes], in the dtype of the format's first array
    scales: np.ndarray | None = None  # float32 [rows], if the format has a scale per row

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
    """The frozen projection P and mean μ of one layer: P·(h − μ) is stored."""

    components: np.ndarray | None  # P, float32[dim, width], rows orthonormal; None for 'none'
    mean: np.ndarray | None  # float32[width]
    explained_variance: np.ndarray | None  # float32[dim], variance of the stored coordinates on the sample
    total_variance: float  # mean over the width of the variance of h over the sample's tokens
    target_variance: float  # mean over dim of the variance over tokens of what is stored
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)  # the format's own tensors, by name in the file


class StoredArray(NamedTuple):
    """One array of a layer: suffix of its name, shape and numpy dtype."""

    suffix: str
    shape: tuple[int, ...]
    dtype: str


class Rounding(NamedTuple):
    """The error of storing each row, as a norm.

    Args:
        most: Largest possible error, float64 [rows].
        usual: Expected error, float64 [rows].
        noise: Factor of the noise of a live state that may be added.
        fits: Whether the rows resemble the sample that the basis was fitted on.
    """

    most: np.ndarray
    usual: np.ndarray
    noise: float = 1.0
    fits: bool = True


class StorageFormat(ABC):
    """A storage format. The methods defined here suit formats that store each coordinate separately."""

    name: ClassVar[str]  # in manifests and in resolved recipes
    by_bytes: ClassVar[bool] = False  # whether `bytes` of the recipe sets the size of a row, or `dim`
    coarse: ClassVar[bool] = False  # whether live targets are encoded too, since the loss exceeds rounding
    needs_basis: ClassVar[bool] = False  # whether decoding needs tensors of the basis
    searches: ClassVar[bool] = False  # whether encoding takes thousands of operations on a device
    sample_rows: ClassVar[int] = 0  # hidden states of the sample that ``fit`` needs
    basis_bytes: ClassVar[int] = 0  # largest size of the format's own tensors in a basis

    @property
    def title(self) -> str:
        """The name for people; a recipe may use it or ``name``."""
        return self.name

    # shapes and sizes

    @abstractmethod
    def arrays(self, spec: LayerSpec, rows: int) -> tuple[StoredArray, ...]:
        """The arrays of a layer with ``rows`` rows: the values, then the scales if there are any."""

    def row_bytes(self, spec: LayerSpec) -> int:
        """Bytes of one row, over all arrays."""
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for _, shape, dtype in self.arrays(spec, 1))

    def empty(self, spec: LayerSpec, rows: int) -> HiddenBlock:
        """An uninitialised block of ``rows`` rows."""
        return HiddenBlock(*(np.empty(shape, dtype) for _, shape, dtype in self.arrays(spec, rows)))

    def dim(self, spec: LayerSpec, basis: Basis | None) -> int:
        """Coordinates of a decoded row. ``basis`` may be None unless ``needs_basis``."""
        return spec.dim

    # validity of recipes and manifests

    def check_keys(self, projection: str | None, row_bytes: int | None) -> None:  # noqa: B027  (most formats accept all)
        """Raises ValueError if a recipe's keys do not fit together; ``row_bytes`` is None unless ``by_bytes``."""

    def layer(self, asked: LayerSpec, width: int, where: str) -> LayerSpec:
        """``asked`` for a layer of ``width``, called ``where`` in messages. Raises ModelError if it does not fit."""
        if asked.projection == "none":
            return replace(asked, dim=width, bytes=0)
        if asked.dim > width:
            raise ModelError(
                f"dump.dim is {asked.dim}, but {where} is only {width} wide: a projection cannot add dimensions",
                f'Set dump.dim to at most {width}, or dump.projection = "none" to store the layer as it is.',
            )
        return replace(asked, bytes=0)

    def check_layer(self, spec: LayerSpec, width: int) -> None:
        """Raises ValueError if a manifest's layer of a teacher of ``width`` is inconsistent."""
        if spec.projection == "none" and spec.dim != width:
            raise ValueError("has not the teacher's width")
        if spec.dim > width:
            raise ValueError(f"has dim {spec.dim} beyond the width {width}")
        if spec.bytes and not self.by_bytes:
            raise ValueError(f"has bytes, which do not belong to {self.name}")

    # names, and candidates of a plan

    def label(self, spec: LayerSpec) -> str:
        """A short description for tables: ``pca 128 int8``."""
        return f"{spec.projection} {spec.dim} {self.title}"

    def keys(self, spec: LayerSpec) -> dict[str, str | int]:
        """The recipe keys that give ``spec``."""
        dim = {} if spec.projection == "none" else {"dim": spec.dim}
        return {"projection": spec.projection, "dtype": self.title, **dim}

    def candidates(self, whole: LayerSpec) -> tuple[LayerSpec, ...]:
        """The variants that a plan measures for a layer that is ``whole`` at full width."""
        return (whole,)

    # encoding

    def unstorable(self, largest: np.ndarray) -> tuple[int, str] | None:
        """The first row that cannot be stored and the reason; ``largest`` [rows]: the maxima of absolute values."""
        finite = np.isfinite(largest)
        return None if finite.all() else (int(np.argmin(finite)), "NaN or infinity")

    @property
    def cure(self) -> str:
        """The hint for a row that cannot be stored."""
        return 'The teacher is at fault: check that its training did not diverge, or set dump.precision = "float32".'

    def check_storable(self, largest: np.ndarray) -> None:
        """Raises NonFiniteError with the number of the first row that cannot be stored; see ``unstorable``."""
        fault = self.unstorable(largest)
        if fault is not None:
            raise NonFiniteError(f"token {fault[0]}: {fault[1]}", self.cure)

    @abstractmethod
    def encode(self, values: np.ndarray, spec: LayerSpec, basis: Basis) -> HiddenBlock:
        """Encode ``values`` float32 [rows, dim]. Raises NonFiniteError as ``check_storable``."""

    @abstractmethod
    def encoder_steps(self, spec: LayerSpec, basis: Basis, device: torch.device | str) -> tuple[OnDevice, OnHost]:
        """Two functions that together do the same, bit for bit, for rows that can be stored.

        The first one computes on the device and does not wait for it; the second one gets its tensors as arrays. Rows
        that cannot be stored may give any codes, but no error in the first one.
        """

    def encoder(self, spec: LayerSpec, basis: Basis, device: torch.device | str) -> Encoder:
        """``encoder_steps`` as one function."""
        on_device, on_host = self.encoder_steps(spec, basis, device)
        return lambda values: on_host([tensor.cpu().numpy() for tensor in on_device(values)])

    # decoding

    def decode(self, block: HiddenBlock, basis: Basis) -> np.ndarray:
        """Decode a stored block to float32 [rows, dim]."""
        values: np.ndarray = block.values.astype(np.float32)
        if block.scales is not None:
            values *= block.scales[:, None]
        return values

    def decoder(self, basis: Basis | None) -> Decoder | None:
        """A function that decodes values on a device; None if they are numbers. The caller applies the scales."""
        return None

    # checks of stored data

    def check_block(self, block: HiddenBlock, spec: LayerSpec, rows: int) -> None:
        """Raises ValueError if dtypes and shapes differ from ``arrays``, or if a code has no value."""
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
        """The error model for an audit; ``projected`` float32 [rows, dim]: P·(h − μ) of live states."""

    # the basis

    def fit(self, basis: Basis, sample: torch.Tensor | None, spec: LayerSpec) -> Basis:
        """``basis`` with the format's own tensors, fitted on hidden states ``sample`` [sample_rows, width]."""
        return basis

    def basis_dim(self, spec: LayerSpec, given: Mapping[str, Sequence[int]]) -> int:
        """Rows of P in a basis file whose tensors have the shapes ``given``."""
        return spec.dim

    def basis_shapes(self, spec: LayerSpec, given: Mapping[str, Sequence[int]]) -> dict[str, TensorShape]:
        """The format's own tensors in a basis file, all required; variable extents are as ``given``, within bounds."""
        return {}

    def check_tables(self, basis: Basis, spec: LayerSpec) -> None:
        """Raises ValueError unless a basis has exactly the format's own tensors, with valid values."""
        if basis.tables:
            raise ValueError(f"a layer in {self.name} has no tensors {', '.join(sorted(basis.tables))}")


_SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)


class RowScaledFormat(StorageFormat):
    """A format with a code of one byte per coordinate and one float32 scale per row; value = number x scale.

    The scale of a row is its absmax divided by ``limit``. A row with a scale below the smallest normal float32 gets
    scale 0 and decodes to zeros.
    """

    dtype: ClassVar[str]  # numpy's, of the codes
    limit: ClassVar[float]  # the number of the largest coordinate of a row

    @abstractmethod
    def codes(self, numbers: np.ndarray) -> np.ndarray:
        """Codes of float32 numbers from ``-limit`` to ``limit``."""

    @abstractmethod
    def codes_on_device(self, numbers: torch.Tensor) -> torch.Tensor:
        """The same on a device, bit for bit."""

    @abstractmethod
    def step(self, block: HiddenBlock) -> np.ndarray:
        """Float64 [rows]: the norm of the distances between neighbouring numbers, before the scale."""

    def arrays(self, spec: LayerSpec, rows: int) -> tuple[StoredArray, ...]:
        return StoredArray("", (rows, spec.dim), self.dtype), StoredArray("-scale", (rows,), "float32")

    def encode(self, values: np.ndarray, spec: LayerSpec, basis: Basis) -> HiddenBlock:
        largest = largest_of(values).astype(np.float32)
        self.check_storable(largest)
        scales = largest / np.float32(self.limit)
        scales[scales < _SMALLEST_SCALE] = 0.0
        numbers = values / np.where(scales > 0.0, scales, np.float32(np.inf))[:, None]
        return HiddenBlock(self.codes(numbers), scales)

    def encoder_steps(self, spec: LayerSpec, basis: Basis, device: torch.device | str) -> tuple[OnDevice, OnHost]:
        import torch

        limit = torch.full((1,), self.limit, device=device)  # a GPU divides by a scalar differently

        def on_device(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            scales = values.abs().amax(dim=1) / limit
            scales = scales.masked_fill_(scales < _SMALLEST_SCALE, 0.0)
            numbers = values / torch.where(scales > 0.0, scales, torch.inf)[:, None]
            return self.codes_on_device(numbers), scales

        return on_device, lambda arrays: HiddenBlock(*arrays)

    def rounding(self, block: HiddenBlock, projected: np.ndarray, spec: LayerSpec, basis: Basis) -> Rounding:
        assert block.scales is not None
        step = block.scales.astype(np.float64) * self.step(block)
        return Rounding(step / 2 * 1.01, step / np.sqrt(12))


def largest_of(values: np.ndarray) -> np.ndarray:
    """The largest absolute value of each row of ``values`` [rows, dim]; NaN if the row has a NaN."""
    largest: np.ndarray = np.abs(values).max(axis=1, initial=0.0)
    return largest


def largest_on_device(values: torch.Tensor) -> torch.Tensor:
    """The same of a tensor on a device."""
    return values.abs().amax(dim=1)
