"""How many bytes a dump stores: payloads, without the few headers around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdcache.cache.spec import LayerSpec, TeacherSpec

_ITEM = {"float32": 4, "float16": 2, "int8": 1, "coded": 0}
_SCALE = 4  # float32 per token of int8
_TOKEN = 4 + 4 + 1 + 1  # start, end, segment, role
_OFFSET = 8  # per text


def row_bytes(spec: LayerSpec) -> int:
    """One row of a layer."""
    return spec.bytes + spec.dim * _ITEM[spec.dtype] + (_SCALE if spec.dtype == "int8" else 0)


def hidden_bytes(tokens: int, texts: int, spec: LayerSpec) -> int:
    """One layer of ``texts`` texts that have ``tokens`` tokens."""
    return (texts if spec.per_text else tokens) * row_bytes(spec)


def outputs_bytes(texts: int, spec: TeacherSpec) -> int:
    """Logits and pooled vectors of ``texts`` texts."""
    return texts * 4 * (sum(spec.target.shape) + (spec.pooled or 0))


def tokens_bytes(tokens: int, texts: int) -> int:
    """Spans, segments and roles."""
    return tokens * _TOKEN + (texts + 1) * _OFFSET
