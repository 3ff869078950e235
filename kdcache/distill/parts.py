"""One part of a cache, decoded for one student: its tokens, and per teacher logits, hidden states and alignment.

Hidden states stay as they were stored (int8 stays int8); only what the student's method uses is read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.ids import id_list
from kdcache.distill.alignment import PartAlignment, ranges
from kdcache.errors import DamageError, MismatchError

if TYPE_CHECKING:
    from kdcache.cache.blocks import HiddenBlock
    from kdcache.cache.reader import Cache
    from kdcache.cache.tokens import Tokens
    from kdcache.data.encoding import EncodedTexts
    from kdcache.distill.align_store import StudentTokens
    from kdcache.distill.examples import JoinedExamples

Texts = Mapping[bytes, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class TeacherPart:
    """What one teacher says of the n texts of a part. ``hidden`` is keyed by the teacher's layer number."""

    logits: np.ndarray | None  # float32[n, C]
    offsets: np.ndarray | None  # int64[n + 1], of the teacher's tokens
    hidden: Mapping[int, HiddenBlock]
    alignment: PartAlignment | None


@dataclass(frozen=True, eq=False)
class Explicit:
    """Entries of an alignment: ``texts`` bounds those of each text, ``first`` and ``past`` those of each student token."""

    texts: np.ndarray  # int64[n + 1]
    first: np.ndarray  # int64[S]
    past: np.ndarray  # int64[S]
    src: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True, eq=False)
class DecodedPart:
    """A part as batches are cut from it."""

    student: EncodedTexts
    teachers: tuple[TeacherPart, ...]

    @functools.cached_property
    def explicit(self) -> tuple[Explicit, ...]:
        """Per teacher with hidden states its alignment entry by entry, that of the identity too."""
        return tuple(_explicit(teacher.alignment, self.student.offsets) for teacher in self.teachers)

    @property
    def nbytes(self) -> int:
        arrays = [array for array in vars(self.student).values() if array is not None]
        for teacher in self.teachers:
            arrays += [array for array in (teacher.logits, teacher.offsets) if array is not None]
            arrays += [array for block in teacher.hidden.values() for array in (block.values, block.scales) if array is not None]
        aligned = sum(teacher.alignment.nbytes for teacher in self.teachers if teacher.alignment is not None)
        return aligned + sum(int(array.nbytes) for array in arrays)


def _explicit(alignment: PartAlignment | None, offsets: np.ndarray) -> Explicit:
    if alignment is None:
        none = np.zeros(0, np.int64)
        return Explicit(none, none, none, none, none)
    bounds, src, weight = alignment.first, alignment.src, alignment.weight
    if bounds is None or src is None or weight is None:
        lengths = np.diff(offsets)
        bounds, weight = np.arange(alignment.tokens + 1), np.ones(alignment.tokens, np.float32)
        src = ranges(np.zeros(len(lengths), np.int64), lengths).astype(np.int32)
    return Explicit(bounds[offsets], bounds[:-1], bounds[1:], src, weight)


@dataclass(frozen=True, eq=False)
class PartDecoder:
    """Reads a part; safe to call from several threads. ``layers``: per teacher, the layers to read (none: no hidden states)."""

    cache: Cache
    student: StudentTokens
    teachers: tuple[str, ...]
    layers: Mapping[str, tuple[int, ...]]
    logits: bool
    texts: Texts | None = None

    def __call__(self, index: int) -> DecodedPart:
        name = self.cache.parts[index].name
        text_ids = self.cache.text_ids(name)
        keep = self.texts is None or all(one in self.texts for one in id_list(text_ids))
        student = self.student.encoded(text_ids, lambda: texts_of(self.cache, name, self.texts), keep=keep)
        return DecodedPart(student, tuple(self._teacher(teacher, name, text_ids, student, keep) for teacher in self.teachers))

    def _teacher(self, teacher: str, part: str, text_ids: np.ndarray, student: EncodedTexts, keep: bool) -> TeacherPart:
        logits = self.cache.outputs(teacher, part).logits if self.logits else None
        layers = self.layers.get(teacher, ())
        if not layers:
            return TeacherPart(logits, None, {}, None)
        hidden = {layer: self.cache.hidden(teacher, part, layer) for layer in sorted(set(layers))}
        of_tokens = [layer for layer in hidden if not self.cache.teachers[teacher].layers[layer].per_text]
        if not of_tokens:
            return TeacherPart(logits, None, hidden, None)
        tokens = self.cache.tokens(teacher, part)
        for layer, block in ((layer, hidden[layer]) for layer in of_tokens):
            if len(block.values) != tokens.offsets[-1]:
                raise DamageError(
                    f"cache '{self.cache.path}': layer {layer} of teacher '{teacher}' has {len(block.values)} tokens in {part}, "
                    f"and the token file says {tokens.offsets[-1]}",
                    "Find out what is damaged with: kdcache cache verify",
                )
        return TeacherPart(logits, tokens.offsets, hidden, self._alignment(teacher, text_ids, student, tokens, keep))

    def _alignment(self, teacher: str, text_ids: np.ndarray, student: EncodedTexts, tokens: Tokens, keep: bool) -> PartAlignment:
        spec = self.cache.teachers[teacher]
        same = self.student.agrees_with(spec.fingerprints.tokenizer, spec.max_length, spec.truncation)
        if same and np.array_equal(student.offsets, tokens.offsets):  # not so where another tokenizers version cut otherwise
            return PartAlignment(len(student.input_ids))
        return self.student.aligned(text_ids, student, tokens, keep=keep)


def check_texts(cache: Cache, texts: Texts | None, examples: JoinedExamples) -> None:
    """MismatchError where a text that will be learned from is neither in the cache nor among those given."""
    if texts is None and not cache.has_text:
        raise MismatchError(
            f"cache '{cache.path}' came without its texts, which the student's tokenizer needs",
            "Give them as texts={text id: columns}, or pull the cache with its texts.",
        )
    lacking = [] if texts is None else [one for one in id_list(examples.text_ids) if one not in texts]
    if lacking:
        raise MismatchError(
            f"{len(lacking)} of the {len(examples)} examples have a text that is not among the texts given; the first is {lacking[0].hex()}",
            "Give the texts of the data that the cache was dumped from.",
        )


def texts_of(cache: Cache, part: str, texts: Texts | None) -> Sequence[tuple[str, ...]]:
    """The texts of a part from the cache, or from ``texts`` by id where given; empty ones stand in for those not given."""
    if texts is None:
        return cache.texts(part)
    empty = ("",) * len(cache.task.text_columns)
    return [texts.get(one, empty) for one in id_list(cache.text_ids(part))]
