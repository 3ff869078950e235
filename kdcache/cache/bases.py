"""The safetensors file of a layer's basis: projection, mean, variances, and the codebook of a coded layer.

The header is compared with the one that the manifest implies before a tensor is looked at; nothing is allocated by what a
file claims.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.blocks import Basis
from kdcache.cache.codebook import MAX_BITS, Codebook, check_codebook

if TYPE_CHECKING:
    from kdcache.cache.spec import LayerSpec

_MAX_HEADER = 1 << 16
_MAX_LEVELS = MAX_BITS << MAX_BITS
_OPTIONAL = {"components", "mean", "explained_variance"}


class BasisDamageError(ValueError):
    """The bytes are not the basis that was expected."""


def check_basis(basis: Basis, spec: LayerSpec, width: int) -> None:
    """Raises ValueError where a basis is not one of ``dim`` rows for hidden states of ``width``, or not finite.

    That of a coded layer has at most ``dim`` rows and a codebook.
    """
    if (basis.components is None) != (spec.projection == "none"):
        raise ValueError(f"projection '{spec.projection}' {'has no' if spec.projection == 'none' else 'needs'} components")
    if (basis.codebook is None) == (spec.dtype == "coded"):
        raise ValueError(f"a layer in {spec.dtype} {'needs a' if spec.dtype == 'coded' else 'has no'} codebook")
    if basis.codebook is not None:
        _check_rows(len(basis.codebook.bits), spec)
        check_codebook(basis.codebook, len(basis.codebook.bits), spec.bytes)
    arrays = _arrays(basis)
    wanted = _shapes(spec, width, {name: values.shape for name, values in arrays.items()})
    for name, values in arrays.items():
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

    _check_header(data, spec, width)
    try:
        arrays = load(data)
    except (SafetensorError, ValueError) as error:
        raise BasisDamageError(f"is not readable: {str(error)[:200]}") from error
    if (spec.projection != "none") != ("components" in arrays):
        raise BasisDamageError(f"has not the components of projection '{spec.projection}'")
    totals = [float(arrays[name][0]) for name in ("total_variance", "target_variance")]
    if not all(math.isfinite(total) and total >= 0 for total in totals):
        raise BasisDamageError("has a variance that is negative or not finite")
    codebook = _codebook(arrays, spec) if spec.dtype == "coded" else None
    return Basis(arrays.get("components"), arrays.get("mean"), arrays.get("explained_variance"), totals[0], totals[1], codebook)


def _codebook(arrays: dict[str, np.ndarray], spec: LayerSpec) -> Codebook:
    codebook = Codebook(arrays["bits"], arrays["scale"], int(arrays["window"][0]), arrays["levels"])
    try:
        check_codebook(codebook, len(codebook.bits), spec.bytes)
    except ValueError as error:
        raise BasisDamageError(f"has a codebook that cannot be: {error}") from error
    return codebook


def _check_rows(rows: int, spec: LayerSpec) -> None:
    if not 1 <= rows <= spec.dim:
        raise ValueError(f"bits has {rows} entries, expected 1 to {spec.dim}")


def _shapes(spec: LayerSpec, width: int, given: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor that may be there; what a codebook leaves open is as ``given``, within its bounds."""
    dim = spec.dim
    coded: dict[str, tuple[str, tuple[int, ...]]] = {}
    if spec.dtype == "coded":
        dim = min(spec.dim, _count(given, "bits"))
        levels = min(_MAX_LEVELS, _count(given, "levels"))
        coded = {"bits": ("U8", (dim,)), "scale": ("F32", (dim,)), "levels": ("F32", (levels,)), "window": ("U8", (1,))}
    return {
        "components": ("F32", (dim, width)),
        "mean": ("F32", (width,)),
        "explained_variance": ("F32", (dim,)),
        "total_variance": ("F64", (1,)),
        "target_variance": ("F64", (1,)),
        **coded,
    }


def _count(given: Mapping[str, Sequence[int]], name: str) -> int:
    """The only extent of a tensor as a file gives it; 1 where that is not one positive number."""
    shape = given.get(name, ())
    known = isinstance(shape, list | tuple) and len(shape) == 1 and type(shape[0]) is int
    return max(1, shape[0]) if known else 1


def _arrays(basis: Basis) -> dict[str, np.ndarray]:
    optional = {"components": basis.components, "mean": basis.mean, "explained_variance": basis.explained_variance}
    if basis.codebook is not None:
        optional |= {"scale": basis.codebook.scale, "levels": basis.codebook.levels}
    arrays = {name: np.ascontiguousarray(value, dtype="<f4") for name, value in optional.items() if value is not None}
    arrays["total_variance"] = np.array([basis.total_variance], dtype="<f8")
    arrays["target_variance"] = np.array([basis.target_variance], dtype="<f8")
    if basis.codebook is not None:
        arrays["bits"] = np.ascontiguousarray(basis.codebook.bits)
        arrays["window"] = np.array([basis.codebook.window], dtype=np.uint8)
    return arrays


def _check_header(data: bytes, spec: LayerSpec, width: int) -> None:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(_MAX_HEADER, len(data) - 8):
        raise BasisDamageError("is not a safetensors file")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise BasisDamageError("has a header that is not JSON") from error
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise BasisDamageError("has a header that is not one of safetensors")
    wanted = _shapes(spec, width, {name: entry.get("shape", ()) for name, entry in header.items()})
    if not wanted.keys() - _OPTIONAL <= header.keys() <= wanted.keys():
        raise BasisDamageError(f"holds other tensors than {', '.join(sorted(wanted))}")
    for name, entry in header.items():
        dtype, shape = wanted[name]
        if entry.get("dtype") != dtype or entry.get("shape") != list(shape):
            raise BasisDamageError(f"has a tensor '{name}' that is not {dtype}{list(shape)}")
