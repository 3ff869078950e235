"""The safetensors file of a layer's basis: projection, mean, variances.

The header is compared with the one that the manifest implies before a tensor is looked at; nothing is allocated by what a
file claims.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.blocks import Basis

if TYPE_CHECKING:
    from kdcache.cache.spec import LayerSpec

_MAX_HEADER = 1 << 16


class BasisDamageError(ValueError):
    """The bytes are not the basis that was expected."""


def check_basis(basis: Basis, spec: LayerSpec, width: int) -> None:
    """Raises ValueError where a basis is not one of ``dim`` rows for hidden states of ``width``, or not finite."""
    if (basis.components is None) != (spec.projection == "none"):
        raise ValueError(f"projection '{spec.projection}' {'has no' if spec.projection == 'none' else 'needs'} components")
    wanted = _shapes(spec, width)
    for name, values in _arrays(basis).items():
        if values.shape != wanted[name][1]:
            raise ValueError(f"{name} has shape {list(values.shape)}, expected {list(wanted[name][1])}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has values that are not finite")


def encode_basis(basis: Basis) -> bytes:
    """The file's bytes: a function of the values alone."""
    from safetensors.numpy import save

    data: bytes = save(_arrays(basis))
    return data


def decode_basis(data: bytes, spec: LayerSpec, width: int) -> Basis:
    """Raises BasisDamageError where the file is not exactly a basis of that shape."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    _check_header(data, _shapes(spec, width))
    try:
        arrays = load(data)
    except (SafetensorError, ValueError) as error:
        raise BasisDamageError(f"is not readable: {error}") from error
    if (spec.projection != "none") != ("components" in arrays):
        raise BasisDamageError(f"has not the components of projection '{spec.projection}'")
    totals = [float(arrays[name][0]) for name in ("total_variance", "target_variance")]
    if not all(math.isfinite(total) and total >= 0 for total in totals):
        raise BasisDamageError("has a variance that is negative or not finite")
    return Basis(arrays.get("components"), arrays.get("mean"), arrays.get("explained_variance"), *totals)


def _shapes(spec: LayerSpec, width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        "components": ("F32", (spec.dim, width)),
        "mean": ("F32", (width,)),
        "explained_variance": ("F32", (spec.dim,)),
        "total_variance": ("F64", (1,)),
        "target_variance": ("F64", (1,)),
    }


def _arrays(basis: Basis) -> dict[str, np.ndarray]:
    optional = {"components": basis.components, "mean": basis.mean, "explained_variance": basis.explained_variance}
    arrays = {name: np.ascontiguousarray(value, dtype="<f4") for name, value in optional.items() if value is not None}
    arrays["total_variance"] = np.array([basis.total_variance], dtype="<f8")
    arrays["target_variance"] = np.array([basis.target_variance], dtype="<f8")
    return arrays


def _check_header(data: bytes, wanted: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(_MAX_HEADER, len(data) - 8):
        raise BasisDamageError("is not a safetensors file")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise BasisDamageError("has a header that is not JSON") from error
    if not isinstance(header, dict) or not {"total_variance", "target_variance"} <= header.keys() <= wanted.keys():
        raise BasisDamageError(f"holds other tensors than {', '.join(sorted(wanted))}")
    for name, entry in header.items():
        dtype, shape = wanted[name]
        if not isinstance(entry, dict) or entry.get("dtype") != dtype or entry.get("shape") != list(shape):
            raise BasisDamageError(f"has a tensor '{name}' that is not {dtype}{list(shape)}")
