"""The specification of a cache: everything its content depends on, as plain values.

A dump compares the existing values with the requested ones. If a field differs, the cache is stale: the dump refuses
and names the field. ``backend`` and ``precision`` are included; use of token types is part of a teacher's tokenizer
fingerprint.

Four things are not included: ``dump.tokens_per_batch``, the device, the number of threads, and library versions. They
change the order of summation, so the last bits of logits and hidden states may differ; texts, ids, labels, tokens and
shapes do not. So equal recipes give equal identities if these four are equal, and a dump may continue if they are not
(docs/decisions/0017).
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
    """The task: names of the text columns, and names of the labels in class order."""

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """How texts are divided into parts: the seed of their order, and texts per part."""

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
    """Whether any layer has a row per token, so that token spans are needed."""
    return any(not spec.per_text for spec in layers.values())


@dataclass(frozen=True)
class TargetSpec:
    """The prediction per text. Format 1 has class logits only; the shape leaves room for vectors and scores."""

    kind: str = "class-logits"
    shape: tuple[int, ...] = ()
    dtype: str = "float32"


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher, and how it was run."""

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
    sample_texts: int  # number of texts that bases and variances were fitted on
    layers: Mapping[int, LayerSpec] = field(default_factory=dict)
