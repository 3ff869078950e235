"""What a cache depends on beyond rounding, as plain values.

Stale is judged by comparing these: what exists must equal what is asked for in every field here, or the dump refuses
and names the field. ``backend`` and ``precision`` are among them. Whether token types are given is part of a teacher's
tokenizer fingerprint.

Four things are not here and may change the last bits of logits and hidden states: ``dump.tokens_per_batch``, the
device, the number of threads, and the versions of libraries. They change the order in which a sum is made, and nothing
else: not texts, ids, labels, tokens or shapes. So "same recipe, same identity" holds where these four are the same, and
a dump may be continued where they are not (docs/decisions/0017).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kdcache.codecs.base import LayerSpec

Scope = Literal["full", "logits"]
HeadKind = Literal["shared", "own"]


@dataclass(frozen=True)
class TaskSpec:
    """The task: names of the text columns, and of the labels in class order."""

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """How texts are put into parts: the seed of their order, and texts per part."""

    seed: int
    part_size: int


@dataclass(frozen=True)
class Fingerprints:
    """sha256 (hex) of a teacher's weights, config, head and tokenizer."""

    weights: str
    config: str
    head: str
    tokenizer: str


def needs_tokens(layers: Mapping[int, LayerSpec]) -> bool:
    """Whether any layer has rows per token, so that spans are stored with them."""
    return any(not spec.per_text for spec in layers.values())


@dataclass(frozen=True)
class TargetSpec:
    """What a teacher predicts per text. Format 1 knows class logits; the shape leaves room for vectors and scores."""

    kind: str = "class-logits"
    shape: tuple[int, ...] = ()
    dtype: str = "float32"


@dataclass(frozen=True)
class TeacherSpec:
    """One teacher as it was run."""

    name: str
    head: HeadKind
    fingerprints: Fingerprints
    depth: int  # blocks
    width: int  # of its hidden states
    max_length: int  # tokens
    truncation: str  # such as 'longest_first'
    backend: str  # 'torch' or 'onnxruntime'
    precision: str  # of the forward pass
    target: TargetSpec
    pooled: int | None  # width of the stored pooled vector
    sample_texts: int  # on which bases and variances are fitted
    layers: Mapping[int, LayerSpec] = field(default_factory=dict)
