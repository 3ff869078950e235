"""One part of a cache, decoded for one student: its tokens, and per teacher logits, hidden states and alignment.

Hidden states stay in their stored dtype, and only what the student's method uses is read. All layers of a teacher are
interleaved: one record per token holds the values and scales of every layer, so that the loader gathers the rows of a
batch once and not once per layer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.cache.digests import enough_memory
from kdcache.cache.ids import id_list
from kdcache.cache.text_table import look_up
from kdcache.codecs.base import HiddenBlock
from kdcache.codecs.registry import format_of
from kdcache.errors import DamageError, MismatchError
from kdcache.loading.alignment import PartAlignment, local_places
from kdcache.loading.buffers import Buffers
from kdcache.loading.order import blocks

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from kdcache.cache.reader import Cache
    from kdcache.cache.tokens import Tokens
    from kdcache.codecs.base import LayerSpec, TokenSelection
    from kdcache.data.encoding import EncodedTexts
    from kdcache.loading.alignment import StudentTokens
    from kdcache.loading.examples import JoinedExamples


Texts = Mapping[bytes, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class TeacherPart:
    """One teacher's outputs for the n texts of a part; ``hidden`` by the tokens that its layers are stored for."""

    logits: np.ndarray | None  # float32[n, C]
    offsets: np.ndarray | None  # int64[n + 1], of the teacher's tokens
    hidden: Mapping[TokenSelection, Interleaved]
    alignment: PartAlignment | None


@dataclass(frozen=True, eq=False)
class CsrAlignment:
    """An alignment packed for looking up the rows of a batch; the identity is written out too.

    An entry is int32: the teacher token, counted from the first of its text, and the bits of the float32 weight.
    """

    texts: np.ndarray  # int64[n + 1], bounds the entries of each text
    counts: np.ndarray  # int32[S], entries of each student token
    entries: np.ndarray  # int32[E, 2]

    @classmethod
    def of(cls, alignment: PartAlignment, offsets: np.ndarray) -> CsrAlignment:
        """``offsets`` [n + 1] are those of the student's tokens."""
        bounds = np.arange(alignment.tokens + 1) if alignment.first is None else alignment.first
        entries = np.empty((int(bounds[-1]), 2), np.int32)
        entries[:, 0] = local_places(offsets) if alignment.src is None else alignment.src
        entries.view(np.float32)[:, 1] = 1 if alignment.weight is None else alignment.weight
        return cls(bounds[offsets], np.diff(bounds).astype(np.int32), entries)


@dataclass(frozen=True, eq=False)
class DecodedPart:
    """A part as batches are cut from it.

    A part of texts with logits only has no alignments, and ``hidden`` without rows: so its records have the same fields
    as those of other parts.
    """

    student: EncodedTexts
    teachers: tuple[TeacherPart, ...]
    text_ids: np.ndarray | None = None  # uint8[n, 16]; of what lies in a cache
    logits_only: bool = False

    @functools.cached_property
    def plain(self) -> bool:
        """Whether a student token needs no lookup but its id: single texts, and the teachers have the same tokens."""
        types = self.student.token_type_ids
        alignments = [teacher.alignment for teacher in self.teachers]
        return (types is None or not types.any()) and all(
            alignment is None or alignment.identical for alignment in alignments
        )

    @functools.cached_property
    def text_records(self) -> Interleaved:
        """One record per text: the span of the student's ``tokens`` and of each teacher's, ``id`` and ``logits``.

        A lookup in one array costs a batch a microsecond per part that it is drawn from, whatever the record holds.
        """
        offsets = {f"tokens {index}": t.offsets for index, t in enumerate(self.teachers) if t.offsets is not None}
        offsets["tokens"] = self.student.offsets
        columns = {name: np.stack([bounds[:-1], bounds[1:]], axis=1) for name, bounds in offsets.items()}
        if self.text_ids is not None:
            columns["id"] = self.text_ids
        logits = [teacher.logits for teacher in self.teachers if teacher.logits is not None]
        if logits and len(logits) == len(self.teachers):
            columns["logits"] = np.stack(logits, axis=1)
        return Interleaved.of(columns)

    @functools.cached_property
    def token_records(self) -> np.ndarray:
        """One record per student token, int32[S, 2 + N]: id, type, and per teacher the count of alignment entries."""
        records = np.zeros((len(self.student.input_ids), 2 + len(self.teachers)), np.int32)
        records[:, 0] = self.student.input_ids
        if self.student.token_type_ids is not None:
            records[:, 1] = self.student.token_type_ids
        for index, alignment in {} if self.logits_only else self.csr.items():
            records[:, 2 + index] = alignment.counts
        return records

    @functools.cached_property
    def csr(self) -> dict[int, CsrAlignment]:
        """The alignment of each teacher that has one, by the teacher's index; without entries where texts have none."""
        alignments = {index: teacher.alignment for index, teacher in enumerate(self.teachers)}
        if self.logits_only:
            nothing = PartAlignment(0)
            csr = CsrAlignment.of(nothing, np.zeros_like(self.student.offsets))
            return {index: csr for index, teacher in enumerate(self.teachers) if teacher.offsets is not None}
        return {
            index: CsrAlignment.of(alignment, self.student.offsets)
            for index, alignment in alignments.items()
            if alignment is not None
        }

    @property
    def nbytes(self) -> int:
        arrays = [array for array in vars(self.student).values() if array is not None]
        for teacher in self.teachers:
            arrays += [array for array in (teacher.logits, teacher.offsets) if array is not None]
            arrays += [layers.rows for layers in teacher.hidden.values()]
        arrays.append(self.text_records.rows)
        if not self.plain:
            arrays += [self.token_records, *(array for csr in self.csr.values() for array in vars(csr).values())]
        elif self.logits_only and any(teacher.offsets is not None for teacher in self.teachers):
            arrays.append(np.broadcast_to(np.int32(0), (len(self.student.input_ids), 2 + len(self.teachers))))
        aligned = sum(teacher.alignment.nbytes for teacher in self.teachers if teacher.alignment is not None)
        return aligned + sum(int(array.nbytes) for array in arrays)


@dataclass(frozen=True, eq=False)
class PartDecoder:
    """Reads a part. The layers of a teacher are read, checked and decoded side by side, by the threads of ``pool``.

    Safe to call from several threads. ``layers``: per teacher, the layers to read (none: no hidden states).
    """

    cache: Cache
    student: StudentTokens
    teachers: tuple[str, ...]
    layers: Mapping[str, tuple[int, ...]]
    logits: bool
    texts: Texts | None = None
    memory: Buffers = field(default_factory=Buffers)

    def __call__(self, index: int, pool: Executor) -> DecodedPart:
        name, logits_only = self.cache.parts[index].name, self.cache.parts[index].scope != "full"
        text_ids = self.cache.text_ids(name)
        keep = self.texts is None or None not in look_up(self.texts, id_list(text_ids))
        student = self.student.encoded(text_ids, lambda: texts_of(self.cache, name, self.texts), keep=keep)
        if logits_only:
            teachers = tuple(self._logits_only(teacher, name, len(student)) for teacher in self.teachers)
        else:
            teachers = tuple(self._teacher(teacher, name, text_ids, student, keep, pool) for teacher in self.teachers)
        return DecodedPart(student, teachers, text_ids, logits_only)

    def _logits_only(self, teacher: str, part: str, texts: int) -> TeacherPart:
        """The outputs of a part without hidden states: no text has a token of the teacher."""
        logits = self.cache.outputs(teacher, part).logits if self.logits else None
        hidden = {tokens: Interleaved.empty(specs, 0) for tokens, specs in self._by_tokens(teacher).items()}
        return TeacherPart(logits, np.zeros(texts + 1, np.int64) if "all" in hidden else None, hidden, None)

    def _teacher(
        self, teacher: str, part: str, text_ids: np.ndarray, student: EncodedTexts, keep: bool, pool: Executor
    ) -> TeacherPart:
        logits = self.cache.outputs(teacher, part).logits if self.logits else None
        layers = self.layers.get(teacher, ())
        if not layers:
            return TeacherPart(logits, None, {}, None)
        hidden = self._hidden(teacher, part, pool)
        if "all" not in hidden:
            return TeacherPart(logits, None, hidden, None)
        tokens = self.cache.tokens(teacher, part)
        if len(hidden["all"].rows) != tokens.offsets[-1]:
            raise self._wrong(
                teacher, part, min(layers), len(hidden["all"].rows), f"the token file says {tokens.offsets[-1]}"
            )
        return TeacherPart(logits, tokens.offsets, hidden, self._alignment(teacher, text_ids, student, tokens, keep))

    def _by_tokens(self, teacher: str) -> dict[TokenSelection, dict[int, LayerSpec]]:
        """The specs of the layers to read, by the tokens that they are stored for."""
        specs: dict[TokenSelection, dict[int, LayerSpec]] = {}
        for layer in sorted(set(self.layers.get(teacher, ()))):
            spec = self.cache.teachers[teacher].layers[layer]
            specs.setdefault(spec.tokens, {})[layer] = spec
        return specs

    def _hidden(self, teacher: str, part: str, pool: Executor) -> dict[TokenSelection, Interleaved]:
        """The layers, each read straight into its place in the records."""
        found = {tokens: self._empty(teacher, part, specs) for tokens, specs in self._by_tokens(teacher).items()}
        blocks = {layer: block for records in found.values() for layer, block in records.blocks().items()}
        for _ in pool.map(lambda layer: self.cache.hidden(teacher, part, layer, blocks[layer]), blocks):
            pass
        return found

    def _empty(self, teacher: str, part: str, specs: Mapping[int, LayerSpec]) -> Interleaved:
        """Records for layers that are stored for the same tokens; DamageError where they are not."""
        counts = {layer: self.cache.row_count(teacher, part, layer) for layer in specs}
        first = next(iter(counts.values()))
        for layer, count in counts.items():
            if count != first:
                raise self._wrong(teacher, part, layer, count, f"another layer {first}")
        with enough_memory(self.cache.path, first * sum(format_of(spec).row_bytes(spec) for spec in specs.values())):
            return Interleaved.empty(specs, first, self.memory)

    def _wrong(self, teacher: str, part: str, layer: int, count: int, other: str) -> DamageError:
        return DamageError(
            f"cache '{self.cache.path}': layer {layer} of teacher '{teacher}' has {count} tokens in {part}, and "
            f"{other}",
            "Find out what is damaged with: kdcache cache verify",
        )

    def _alignment(
        self, teacher: str, text_ids: np.ndarray, student: EncodedTexts, tokens: Tokens, keep: bool
    ) -> PartAlignment:
        spec = self.cache.teachers[teacher]
        same = self.student.agrees_with(spec.fingerprints.tokenizer, spec.max_length, spec.truncation)
        if same and np.array_equal(
            student.offsets, tokens.offsets
        ):  # not so where another tokenizers version cut otherwise
            return PartAlignment(len(student.input_ids))
        return self.student.aligned(text_ids, student, tokens, keep=keep).simplified(student.offsets, tokens.offsets)


def check_texts(cache: Cache, texts: Texts | None, examples: JoinedExamples) -> None:
    """Raise MismatchError where the text of an example is neither in the cache nor in ``texts``."""
    if texts is None and not cache.has_text:
        raise MismatchError(
            f"cache '{cache.path}' came without its texts, which the student's tokenizer needs",
            "Give them as texts={text id: columns}, or pull the cache with its texts.",
        )
    lacking, first = 0, b""
    for some in blocks(len(examples)) if texts is not None else ():
        ids = id_list(examples.text_ids[some])
        absent = [one for one, text in zip(ids, look_up(texts or {}, ids), strict=True) if text is None]
        lacking, first = lacking + len(absent), first or next(iter(absent), b"")
    if lacking:
        raise MismatchError(
            f"{lacking} of the {len(examples)} examples have a text that is not among the texts given; the first "
            f"is {first.hex()}",
            "Give the texts of the data that the cache was dumped from.",
        )


def texts_of(cache: Cache, part: str, texts: Texts | None) -> Sequence[tuple[str, ...]]:
    """The texts of a part: the cache's, or those of ``texts`` by id, where a missing one becomes an empty text."""
    if texts is None:
        return cache.texts(part)
    empty = ("",) * len(cache.task.text_columns)
    return [text or empty for text in look_up(texts, id_list(cache.text_ids(part)))]


@dataclass(frozen=True, eq=False)
class Interleaved:
    """Records of several fields as bytes, uint8 [T, record]; ``dtype`` says which bytes of a record are what."""

    rows: np.ndarray
    dtype: np.dtype

    @classmethod
    def of(cls, fields: Mapping[str, np.ndarray]) -> Interleaved:
        """From arrays with the same number of rows. One alone is not copied."""
        dtype = np.dtype([(name, array.dtype, array.shape[1:]) for name, array in fields.items()], align=True)
        count = len(next(iter(fields.values())))
        if len(fields) == 1:
            (array,) = fields.values()
            return cls(np.ascontiguousarray(array).view(np.uint8).reshape(count, dtype.itemsize), dtype)
        mixed = np.empty(count, dtype)
        for name, array in fields.items():
            mixed[name] = array
        return cls(mixed.view(np.uint8).reshape(count, dtype.itemsize), dtype)

    @classmethod
    def empty(cls, specs: Mapping[int, LayerSpec], count: int, memory: Buffers | None = None) -> Interleaved:
        """Uninitialised records for layers that are stored as ``specs``; ``blocks`` gives their arrays."""
        fields = {
            name: (array.dtype, array.shape[1:])
            for layer, spec in specs.items()
            for name, array in _fields(layer, format_of(spec).empty(spec, 0))
        }
        dtype = np.dtype([(name, *field) for name, field in fields.items()], align=True)
        size = count * dtype.itemsize
        rows = np.empty(size, np.uint8) if memory is None else memory.empty(size)
        return cls(rows.reshape(count, dtype.itemsize), dtype)

    def blocks(self) -> dict[int, HiddenBlock]:
        """Each layer as a block whose arrays are views of the records."""
        table = fields_of(self.rows, self.dtype)
        return {
            layer: HiddenBlock(table[values], None if scales is None else table[scales])
            for layer, values, scales in _names(self.dtype)
        }

    @property
    def bytes(self) -> memoryview:
        """All records as one buffer."""
        return self.rows.reshape(-1).data


GATHERED_AS_BYTES = 1 << 20  # of a batch; copying them takes about 80 us


def gather_spans(
    parts: Sequence[memoryview], spans: Sequence[tuple[int, int, int]], count: int, size: int
) -> np.ndarray:
    """Records uint8 [count, size] of several parts, span by span; a span is (part, first byte, last byte + 1).

    Joining bytes is faster than ``np.concatenate`` for short spans, but it holds the GIL. More than
    ``GATHERED_AS_BYTES`` are therefore joined as arrays, which releases it.
    """
    pieces = [parts[part][start:end] for part, start, end in spans]
    if count * size > GATHERED_AS_BYTES:
        return np.concatenate([np.asarray(piece) for piece in pieces]).reshape(count, size)
    return np.frombuffer(bytearray().join(pieces), np.uint8).reshape(count, size)


def fields_of(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Records uint8 [n, record] as a structured array [n]: a view."""
    return rows.reshape(-1).view(dtype)


def _fields(layer: int, block: HiddenBlock) -> list[tuple[str, np.ndarray]]:
    values, scales = (f"values {layer}", block.values), (f"scales {layer}", block.scales)
    return [values] if scales[1] is None else [values, (scales[0], scales[1])]


def layers_of(rows: np.ndarray, dtype: np.dtype) -> dict[int, tuple[torch.Tensor, torch.Tensor | None]]:
    """Values [n, dim] and scales [n] of each layer in ``rows`` uint8 [n, row]: views, nothing is copied."""
    table = fields_of(rows, dtype)
    return {
        layer: (torch.from_numpy(table[values]), None if scales is None else torch.from_numpy(table[scales]))
        for layer, values, scales in _names(dtype)
    }


@functools.lru_cache
def _names(dtype: np.dtype) -> list[tuple[int, str, str | None]]:
    """Per layer, the names of its values and of its scales, if it has any."""
    layers = [int(name.split()[1]) for name in dtype.names or () if name.startswith("values")]
    return [
        (layer, f"values {layer}", f"scales {layer}" if f"scales {layer}" in (dtype.names or ()) else None)
        for layer in layers
    ]
