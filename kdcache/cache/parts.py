"""Texts that are run together, and what is still missing of a teacher on them: what a writer hands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from kdcache.cache.spec import Scope


@dataclass(frozen=True)
class Part:
    """Texts that are run together. Scope 'full' gets everything, 'logits' gets outputs alone."""

    name: str
    scope: Scope
    text_ids: np.ndarray  # uint8[n, 16]


@dataclass(frozen=True)
class PartTask:
    """What is still missing of one teacher and part."""

    part: Part
    outputs: bool
    layers: tuple[int, ...]
