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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, Protocol

from kdcache.errors import MismatchError
from kdcache.progress import listed, listed_apart

if TYPE_CHECKING:
    from kdcache.codecs.base import LayerSpec

Scope = Literal["full", "logits"]
HeadKind = Literal["shared", "own"]
_INTEGER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class TaskSpec:
    """The task: names of the text columns, and of the labels in class order."""

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]


class LabelledTask(Protocol):
    """What a task is compared by: a ``TaskSpec``, data files or trained teachers have it."""

    @property
    def text_columns(self) -> tuple[str, ...]: ...

    @property
    def label_names(self) -> tuple[str, ...]: ...


def check_same_task(
    ours: LabelledTask, theirs: LabelledTask, subjects: tuple[str, str], cure: str, *, same_column_names: bool = True
) -> None:
    """Raise MismatchError where two tasks differ in their labels, their class order or their text columns.

    Args:
        ours: what is given now, usually the data.
        theirs: what exists already, such as a cache or trained teachers.
        subjects: how the message names the two, such as ``("the data", "cache 'x'")``.
        cure: the hint of the error.
        same_column_names: False where only the number of text columns matters.
    """
    if ours.label_names != theirs.label_names:
        shown = listed_apart(ours.label_names, theirs.label_names)
        raise MismatchError(
            f"the labels of {subjects[0]} are {shown[0]}; those of {subjects[1]} are {shown[1]}",
            mismatch_cure(ours.label_names, theirs.label_names, cure),
        )
    if same_column_names and ours.text_columns != theirs.text_columns:
        columns = listed(ours.text_columns), listed(theirs.text_columns)
        raise MismatchError(
            f"the text columns of {subjects[0]} are {columns[0]}; those of {subjects[1]} are {columns[1]}", cure
        )
    if len(ours.text_columns) != len(theirs.text_columns):
        raise MismatchError(
            f"{subjects[0]} has {len(ours.text_columns)} text columns, {subjects[1]} has {len(theirs.text_columns)}",
            cure,
        )


def mismatch_cure(given: Sequence[str], wanted: Sequence[str], cure: str) -> str:
    """``cure``, or another one where the given labels are integers and the wanted ones are names.

    Setting data.labels then fixes what each integer means, so the user must know that meaning first.
    """
    if all(_INTEGER.fullmatch(name) for name in given) and not any(_INTEGER.fullmatch(name) for name in wanted):
        return (
            "The data number their classes: set data.labels to these names where 0 is the first of them, 1 the second "
            "and so on; else write the names into the data."
        )
    return cure


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


def differing(stored: Fingerprints, found: Fingerprints) -> str:
    """Name the fingerprints that differ, for a message: ``weights 1a2b… instead of 3c4d…``; empty if none does."""
    pairs = ((item.name, getattr(stored, item.name), getattr(found, item.name)) for item in fields(stored))
    return ", ".join(f"{name} {new[:12]} instead of {old[:12]}" for name, old, new in pairs if old != new)


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
