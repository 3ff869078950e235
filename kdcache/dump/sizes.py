"""How many bytes a dump stores: payloads, without the few headers around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.codecs.registry import format_of

if TYPE_CHECKING:
    from kdcache.cache.spec import TeacherSpec
    from kdcache.codecs.base import LayerSpec

_TOKEN = 4 + 4 + 1 + 1  # start, end, segment, role
_OFFSET = 8  # per text


def hidden_bytes(tokens: int, texts: int, spec: LayerSpec) -> int:
    """One layer of ``texts`` texts that have ``tokens`` tokens."""
    return (texts if spec.per_text else tokens) * format_of(spec).row_bytes(spec)


def outputs_bytes(texts: int, spec: TeacherSpec) -> int:
    """Logits and pooled vectors of ``texts`` texts."""
    return texts * 4 * (sum(spec.target.shape) + (spec.pooled or 0))


def tokens_bytes(tokens: int, texts: int) -> int:
    """Spans, segments and roles."""
    return tokens * _TOKEN + (texts + 1) * _OFFSET
