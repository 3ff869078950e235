"""The safetensors file of a layer's basis: projection, mean, variances, and the tensors of its storage format.

The decoder first compares the header with the one that the manifest implies. So it never allocates the size that a file
claims.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdcache.codecs.base import Basis
from kdcache.codecs.registry import format_of

if TYPE_CHECKING:
    from kdcache.codecs.base import LayerSpec

_MAX_HEADER = 1 << 16
_OPTIONAL = {"components", "mean", "explained_variance"}
_COMMON = _OPTIONAL | {"total_variance", "target_variance"}


class BasisDamageError(ValueError):
    """The bytes are not the basis that was expected."""


def check_basis(basis: Basis, spec: LayerSpec, width: int) -> None:
    """Raises ValueError unless a basis is finite and has ``dim`` rows for hidden states of ``width``.

    The storage format checks its own tensors, and may allow fewer rows.
    """
    if (basis.components is None) != (spec.projection == "none"):
        raise ValueError(
            f"projection '{spec.projection}' {'has no' if spec.projection == 'none' else 'needs'} components"
        )
    format_of(spec).check_tables(basis, spec)
    arrays = _arrays(basis)
    wanted = _shapes(spec, width, {name: values.shape for name, values in arrays.items()})
    for name, values in arrays.items():
        if values.shape != wanted[name][1]:
            raise ValueError(f"{name} has shape {list(values.shape)}, expected {list(wanted[name][1])}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has values that are not finite")


def encode_basis(basis: Basis) -> bytes:
    """The bytes of the file; they depend only on the values."""
    from safetensors.numpy import save

    data: bytes = save(_arrays(basis))
    return data


def decode_basis(data: bytes, spec: LayerSpec, width: int) -> Basis:
    """The basis in a file. Raises BasisDamageError unless it has exactly the tensors of ``spec``."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    _check_header(data, spec, width)
    try:
        arrays = load(data)
    except (SafetensorError, ValueError) as error:
        raise BasisDamageError(f"is not readable: {str(error)[:200]}") from error
    if (spec.projection != "none") != ("components" in arrays):
        raise BasisDamageError(
            f"{'has' if 'components' in arrays else 'lacks'} components, with projection '{spec.projection}'"
        )
    totals = [float(arrays[name][0]) for name in ("total_variance", "target_variance")]
    if not all(math.isfinite(total) and total >= 0 for total in totals):
        raise BasisDamageError("has a variance that is negative or not finite")
    tables = {name: values for name, values in arrays.items() if name not in _COMMON}
    basis = Basis(
        arrays.get("components"), arrays.get("mean"), arrays.get("explained_variance"), totals[0], totals[1], tables
    )
    try:
        format_of(spec).check_tables(basis, spec)
    except ValueError as error:
        raise BasisDamageError(f"has invalid tensors: {error}") from error
    return basis


def _shapes(spec: LayerSpec, width: int, given: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Data type and shape of all possible tensors; variable extents are as ``given``, within bounds of the format."""
    storage = format_of(spec)
    dim = storage.basis_dim(spec, given)
    return {
        "components": ("F32", (dim, width)),
        "mean": ("F32", (width,)),
        "explained_variance": ("F32", (dim,)),
        "total_variance": ("F64", (1,)),
        "target_variance": ("F64", (1,)),
        **storage.basis_shapes(spec, given),
    }


def _arrays(basis: Basis) -> dict[str, np.ndarray]:
    optional = {"components": basis.components, "mean": basis.mean, "explained_variance": basis.explained_variance}
    arrays = {name: np.ascontiguousarray(value, dtype="<f4") for name, value in optional.items() if value is not None}
    arrays["total_variance"] = np.array([basis.total_variance], dtype="<f8")
    arrays["target_variance"] = np.array([basis.target_variance], dtype="<f8")
    tables = {
        name: np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<")) for name, value in basis.tables.items()
    }
    return arrays | tables


def _check_header(data: bytes, spec: LayerSpec, width: int) -> None:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(_MAX_HEADER, len(data) - 8):
        raise BasisDamageError("is not a safetensors file")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise BasisDamageError("has a header that is not JSON") from error
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise BasisDamageError("has a header that is not that of safetensors")
    wanted = _shapes(spec, width, {name: entry.get("shape", ()) for name, entry in header.items()})
    if not wanted.keys() - _OPTIONAL <= header.keys() <= wanted.keys():
        raise BasisDamageError(f"holds other tensors than {', '.join(sorted(wanted))}")
    for name, entry in header.items():
        dtype, shape = wanted[name]
        if entry.get("dtype") != dtype or entry.get("shape") != list(shape):
            raise BasisDamageError(f"has a tensor '{name}' that is not {dtype}{list(shape)}")
