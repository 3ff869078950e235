"""In which form a layer's targets travel: as stored, to be decoded on the device; per token or per text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.codecs.registry import format_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kdcache.cache.reader import Cache
    from kdcache.codecs.base import Basis, Decoder, TokenSelection


@dataclass(frozen=True, eq=False)
class Form:
    """How the targets of one layer come: which tokens, and what decodes their values where these are no numbers yet."""

    tokens: TokenSelection = "all"
    decoder: Decoder | None = None


Forms = dict[tuple[str, int], Form]  # (teacher, its layer)


def stored_forms(cache: Cache, layer_map: Mapping[str, tuple[int, ...]]) -> Forms:
    """The forms of the layers that are used; reads the bases of those that cannot be decoded without."""
    forms: Forms = {}
    for teacher, layers in layer_map.items():
        for layer in sorted(set(layers)):
            spec = cache.teachers[teacher].layers[layer]
            forms[teacher, layer] = Form(spec.tokens, format_of(spec).decoder(_basis(cache, teacher, layer)))
    return forms


def target_dim(cache: Cache, teacher: str, layer: int) -> int:
    """Width of the stored targets."""
    spec = cache.teachers[teacher].layers[layer]
    return format_of(spec).dim(spec, _basis(cache, teacher, layer))


def _basis(cache: Cache, teacher: str, layer: int) -> Basis | None:
    """The basis, where the layer's format needs it to decode."""
    return cache.basis(teacher, layer) if format_of(cache.teachers[teacher].layers[layer]).needs_basis else None
