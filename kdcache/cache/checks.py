"""What a part must be before it is written: the shapes of its specification, and finite values throughout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.tokens import OTHER, Tokens
from kdcache.codecs.registry import format_of
from kdcache.errors import NonFiniteError

if TYPE_CHECKING:
    from kdcache.cache.spec import TeacherSpec
    from kdcache.cache.tokens import Outputs
    from kdcache.codecs.base import HiddenBlock

_HINT = "Look at that text and at the teacher; a half-precision backend may overflow: try precision = 'float32'."


def check_outputs(outputs: Outputs, spec: TeacherSpec, part: str, ids: np.ndarray) -> None:
    """Raises ValueError for a wrong shape or dtype, NonFiniteError (with text id) for NaN or infinity."""
    wanted = {"logits": (outputs.logits, spec.target.shape[0])}
    if (outputs.pooled is None) != (spec.pooled is None):
        raise ValueError(
            f"teacher '{spec.name}' is declared with pooled {spec.pooled}, its outputs of {part} say otherwise"
        )
    if outputs.pooled is not None and spec.pooled is not None:
        wanted["pooled"] = (outputs.pooled, spec.pooled)
    for name, (values, width) in wanted.items():
        if values.shape != (len(ids), width) or values.dtype != np.float32:
            raise ValueError(
                f"{name} of {part} is {values.dtype}{list(values.shape)}, expected float32{[len(ids), width]}"
            )
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise _not_finite(name, spec, part, ids, int(bad.argmax()))


def check_tokens(tokens: Tokens, part: str, texts: int) -> None:
    """Raises ValueError where offsets, lengths, dtypes or roles do not fit together."""
    total = len(tokens.starts)
    offsets = tokens.offsets
    if (
        offsets.dtype != np.int64
        or len(offsets) != texts + 1
        or offsets[0] != 0
        or offsets[-1] != total
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(f"offsets of {part} are not int64[{texts + 1}] from 0 to {total}")
    for name, dtype in (("starts", np.int32), ("ends", np.int32), ("segments", np.int8), ("roles", np.int8)):
        values = getattr(tokens, name)
        if values.dtype != dtype or values.shape != (total,):
            raise ValueError(
                f"{name} of {part} is {values.dtype}{list(values.shape)}, expected {np.dtype(dtype)}[{total}]"
            )
    if total and (tokens.roles.min() < 0 or tokens.roles.max() > OTHER or (tokens.starts > tokens.ends).any()):
        raise ValueError(f"tokens of {part} have an unknown role, or an end before its start")


def check_hidden(
    block: HiddenBlock, layer: int, spec: TeacherSpec, part: str, ids: np.ndarray, offsets: np.ndarray
) -> None:
    """Raises ValueError for a wrong shape or dtype, NonFiniteError (with text id and layer) for NaN or infinity.

    ``offsets`` int64 [n + 1]: text i owns rows ``offsets[i]:offsets[i + 1]`` of the layer.
    """
    layer_spec = spec.layers[layer]
    storage = format_of(layer_spec)
    try:
        storage.check_block(block, layer_spec, int(offsets[-1]))
    except ValueError as error:
        raise ValueError(f"layer {layer} of {part} {error}") from error
    good = storage.finite_rows(block)
    if not good.all():
        token = int((~good).argmax())
        text = int(np.searchsorted(offsets, token, side="right")) - 1
        raise _not_finite(f"layer {layer}", spec, part, ids, text)


def _not_finite(what: str, spec: TeacherSpec, part: str, ids: np.ndarray, row: int) -> NonFiniteError:
    text = bytes(ids[row]).hex()
    return NonFiniteError(
        f"teacher '{spec.name}' gave a value that is not finite in {what} for text {text} ({part}, row {row})", _HINT
    )
