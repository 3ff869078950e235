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

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kdcache.errors import MismatchError
from kdcache.progress import listed, listed_apart

if TYPE_CHECKING:
    from kdcache.codecs.base import LayerSpec

Scope = Literal["full", "logits"]
HeadKind = Literal["shared", "own"]
IMPORTED = "imported"  # the backend of a teacher whose logits come from a file; its precision names their kind
# ends the precision of a teacher whose head ran in float32 behind an encoder in half precision; without it the head ran
# as the encoder, as in 0.1.0
FLOAT32_HEAD = "+float32-head"
COMPILED = "+compiled"  # ends the precision of a teacher that ran as graphs of torch.compile
_INTEGER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class TaskSpec:
    """The task: names of the text columns, and names of the labels in class order."""

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
    """Raise MismatchError if two tasks differ in their labels, their class order or their text columns.

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
    """``cure``, or another hint if the given labels are integers and the wanted labels are names.

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
    """How texts are divided into parts: the seed of their order, and texts per part."""

    seed: int
    part_size: int


PART_SIZE, LARGEST_PART_SIZE = 4096, 16384  # texts of a part that nobody chose
_PARTS = 1024  # from which on parts become larger


def chosen_part_size(texts: int) -> int:
    """The part size of a new cache of so many texts: 4,096, doubled up to 16,384 while that makes over 1,024 parts.

    The manifest and the number of files grow with the parts, and the memory of a loader with the part size.
    """
    size = PART_SIZE
    while texts > _PARTS * size and size < LARGEST_PART_SIZE:
        size *= 2
    return size


@dataclass(frozen=True)
class Fingerprints:
    """sha256 (hex) of a teacher's weights, config, head and tokenizer."""

    weights: str
    config: str
    head: str
    tokenizer: str


def differing(stored: Fingerprints, found: Fingerprints) -> str:
    """Name the fingerprints that differ, for a message: ``weights 1a2b… instead of 3c4d…``; empty if none does."""
    return ", ".join(f"{name} {new} instead of {old}" for name, old, new in differing_fields(stored, found))


def differing_fields(old: Any, new: Any, fingerprint: str = "{}") -> Iterator[tuple[str, Any, Any]]:
    """The fields of two specifications that differ, except layers: name, old and new value.

    Fingerprints are compared one by one and shortened; the format string ``fingerprint`` makes their names.
    """
    for item in fields(old):
        before, now = getattr(old, item.name), getattr(new, item.name)
        if isinstance(before, Fingerprints):
            yield from ((fingerprint.format(name), *pair) for name, *pair in differing_fields(before, now))
        elif before != now and not isinstance(before, Mapping):
            yield item.name, *((before[:12], now[:12]) if isinstance(old, Fingerprints) else (before, now))


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
class FoldsSpec:
    """The bundles that the logits of a teacher's train texts come from.

    ``weights``: per fold the fingerprint of the teacher that did not see its texts. ``logits``: sha256 of all
    out-of-fold logits, of which there are ``texts``.
    """

    weights: tuple[str, ...]
    logits: str
    texts: int

    def __str__(self) -> str:
        return f"{len(self.weights)} folds ({self.logits[:12]})"


def uncompiled(precision: str) -> str:
    """A precision of a specification without ``COMPILED``."""
    return precision.removesuffix(COMPILED)


def number_format(precision: str) -> str:
    """The first part of a precision: ``float32``, ``bf16`` or ``fp16``."""
    return uncompiled(precision).removesuffix(FLOAT32_HEAD)


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
    precision: str  # of the forward pass; may end with FLOAT32_HEAD, COMPILED, or both in this order
    target: TargetSpec
    pooled: int | None  # width of the stored pooled vector
    sample_texts: int  # number of texts that bases and variances were fitted on
    layers: Mapping[int, LayerSpec] = field(default_factory=dict)
    folds: FoldsSpec | None = None  # None: all logits are those of this teacher

    @property
    def encoder_precision(self) -> str:
        """The precision without regard to the head: ``float32``, ``bf16`` or ``fp16``."""
        return number_format(self.precision)

    @property
    def uncompiled(self) -> str:
        """The precision for a run that is compared within a tolerance, for which nothing is compiled."""
        return uncompiled(self.precision)

    @property
    def compiled(self) -> bool:
        """Whether it ran as graphs of torch.compile."""
        return self.precision.endswith(COMPILED)

    @property
    def imported(self) -> bool:
        """Whether its logits come from a file, and not from a model that kdcache ran."""
        return self.backend == IMPORTED
