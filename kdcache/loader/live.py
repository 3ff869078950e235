"""The same batches with teachers that run now: what a cache replaces, and what it is measured against.

Order, alignment and batch structure are those of ``CachedBatches``; only the values come from a forward pass. With
``projection = "none"`` and float32 the two agree to the rounding that different padding causes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from kdcache.codecs.projection import Projector
from kdcache.codecs.registry import format_of
from kdcache.codecs.token_selection import select_tokens
from kdcache.data.encoding import (
    TRUNCATION,
    EncodedTexts,
    encode,
    pad,
    padding_id,
    token_budget_batches,
    tokenizer_fingerprint,
)
from kdcache.errors import MismatchError
from kdcache.loader.alignment import StudentTokens, align, student_tokens
from kdcache.loader.assembly import Pieces, Rows, Sheets, alignment_pieces, longest_first, student_inputs, text_pieces
from kdcache.loader.choice import Form, chosen_teachers, splits_of, target_dim
from kdcache.loader.examples import JoinedExamples, join_examples
from kdcache.loader.order import Epochs
from kdcache.loader.parts import DecodedPart, TeacherPart, Texts, check_texts, texts_of
from kdcache.loader.targets import Batch, Hidden, Targets
from kdcache.methods.parts.layer_map import LayerMap, LayersOfEpoch, layers_read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdcache.cache.reader import Cache
    from kdcache.cache.tokens import Tokens
    from kdcache.codecs.base import Encoder
    from kdcache.loader.order import Window
    from kdcache.teachers.backends import TeacherBackend, TeacherOutput
    from kdcache.teachers.teacher import Teacher

_TOKENS_PER_PASS = 4096  # padded tokens of one forward pass over a split


@dataclass(frozen=True, eq=False)
class _Running:
    """A teacher that is ready, and what turns its hidden states into what the cache stores."""

    teacher: Teacher
    backend: TeacherBackend
    layers: tuple[int, ...]
    same_tokens: bool  # as the student's
    stored: Mapping[int, _Stored]

    def run(self, encoded: EncodedTexts, rows: np.ndarray, layers: Sequence[int]) -> TeacherOutput:
        return self.backend.run(pad(encoded, rows, padding_id(self.teacher.tokenizer)), layers, False)


@dataclass(frozen=True, eq=False)
class _Stored:
    """From a teacher's hidden states to the targets that a cache would give for one of its layers.

    What storing merely rounds is not stored and read back: ``encode`` is None.
    """

    form: Form
    project: Projector | None  # None: states come at full width
    encode: Encoder | None

    def __call__(self, hidden: torch.Tensor, lengths: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values and scales [rows, ...]; tensors that autograd may keep, which those of inference mode are not."""
        selected = select_tokens(hidden, lengths, self.form.tokens)
        projected = selected if self.project is None else self.project(selected)
        if self.encode is None:
            return (projected.clone() if projected.is_inference() else projected), None
        block = self.encode(projected)
        values, scales = (
            None if one is None else torch.from_numpy(one).to(hidden.device) for one in (block.values, block.scales)
        )
        assert values is not None
        return values, scales


class LiveBatches:
    """A ``TargetSource`` whose teachers run on every batch. The cache gives texts, examples, order and variances.

    ``teachers`` are loaded ones, by name a subset of the cache's; ``backends`` may say, per name, what runs them (torch
    in float32 where it does not). With ``project`` hidden states go through the stored bases, else they come at full
    width. The other parameters, and the errors, are those of ``CachedBatches``; MismatchError too where a teacher is
    not the one that the cache was dumped from.
    """

    def __init__(
        self,
        cache: Cache,
        student_tokenizer: PreTrainedTokenizerBase,
        split: str = "train",
        with_transfer: bool = True,
        *,
        teachers: Sequence[Teacher],
        batch_size: int,
        max_length: int,
        layer_map: Mapping[str, tuple[int | None, ...]] | None = None,
        layers_at: LayersOfEpoch | None = None,
        backends: Mapping[str, TeacherBackend] | None = None,
        project: bool = True,
        seed: int = 0,
        window: Window = 8,
        missing: Literal["error", "skip"] = "error",
        hidden: bool = False,
        logits: bool = True,
        rank: int = 0,
        world: int = 1,
        texts: Texts | None = None,
    ) -> None:
        self.cache = cache
        names = [teacher.name for teacher in teachers]
        self.teachers, self.layer_map = chosen_teachers(
            cache, names, layer_map if hidden else None, taking_turns=layers_at is not None
        )
        self._layers_at = layers_at
        examples = join_examples(
            cache, splits_of(cache, split, with_transfer), missing=missing, hidden=bool(self.layer_map)
        )
        check_texts(cache, texts, examples)
        self.skipped = examples.skipped
        self.epochs = Epochs(examples, batch_size, seed, window, rank, world)
        self._student = StudentTokens(student_tokenizer, max_length)
        self._project, self._logits, self._texts = project, logits, texts
        self._running = [self._ready(teacher, (backends or {}).get(teacher.name)) for teacher in teachers]
        self._part_texts: dict[int, Sequence[tuple[str, ...]]] = {}
        self._covered = np.zeros((len(names), 2), np.int64)
        self._truncated = np.zeros(2, np.int64)  # rows that the student reads cut, and all of them

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, the same in every process."""
        return self.epochs.steps

    @property
    def coverage(self) -> dict[str, float]:
        """Per teacher with hidden states, the share of student tokens that have a target, over the batches so far."""
        pairs = zip(self.teachers, self._covered.tolist(), strict=True)
        return {name: covered / tokens for name, (covered, tokens) in pairs if tokens}

    @property
    def truncated(self) -> float | None:
        """Share of the rows that the student reads cut to ``max_length``, over the batches so far; None before any."""
        cut, rows = self._truncated.tolist()
        return cut / rows if rows else None

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The share of process ``rank`` of every step of ``epoch`` from ``first_step`` on.

        Targets lie on the teachers' device.
        """
        order, layers = self.epochs.order(epoch), self.layers_at(epoch)
        for step in range(first_step, self.steps_per_epoch):
            yield self._batch(self.epochs.rows(order, step), layers)

    def layers_at(self, epoch: int) -> LayerMap:
        """The layer map of an epoch."""
        return self.layer_map if self._layers_at is None else self._layers_at(epoch)

    def target_dim(self, teacher: str, layer: int) -> int:
        """Width of the targets of a teacher's layer."""
        return target_dim(self.cache, teacher, layer) if self._project else self.cache.teachers[teacher].width

    def target_variance(self, teacher: str, layer: int) -> float:
        """Mean over dimensions of the variance over tokens of the target."""
        basis = self.cache.basis(teacher, layer)
        return basis.target_variance if self._project else basis.total_variance

    def logits_for(self, split: str) -> torch.Tensor:
        """The teachers' logits of every example of ``split`` in its order, [N, n, C] float32, in main memory."""
        examples = join_examples(self.cache, (split,))
        check_texts(self.cache, self._texts, examples)
        texts = self._texts_at(examples, np.arange(len(examples)))
        found = torch.empty(len(self._running), len(examples), len(self.cache.task.label_names))
        for index, running in enumerate(self._running):
            encoded = encode(running.teacher.tokenizer, texts, running.teacher.max_length)
            for rows in token_budget_batches(encoded.lengths, _TOKENS_PER_PASS):
                found[index, torch.from_numpy(rows)] = running.run(encoded, rows, ()).logits.cpu()
        return found

    def _ready(self, teacher: Teacher, backend: TeacherBackend | None) -> _Running:
        from kdcache.teachers.backends.torch_backend import TorchBackend

        _check_same(self.cache, teacher)
        layers = layers_read(self.layer_map.get(teacher.name, ()))
        same = self._student.agrees_with(tokenizer_fingerprint(teacher.tokenizer), teacher.max_length, TRUNCATION)
        backend = backend or TorchBackend(teacher, precision="float32")
        stored = {layer: self._stored(teacher.name, layer, backend.device) for layer in layers}
        return _Running(teacher, backend, layers, same, stored)

    def _stored(self, teacher: str, layer: int, device: str) -> _Stored:
        spec = self.cache.teachers[teacher].layers[layer]
        if not self._project:
            return _Stored(Form(spec.tokens), None, None)
        storage, basis = format_of(spec), self.cache.basis(teacher, layer)
        if not storage.coarse:
            return _Stored(Form(spec.tokens), Projector(basis, device), None)
        return _Stored(
            Form(spec.tokens, storage.decoder(basis)), Projector(basis, device), storage.encoder(spec, basis, device)
        )

    def _texts_at(self, examples: JoinedExamples, places: np.ndarray) -> list[tuple[str, ...]]:
        found = []
        for part, row in zip(examples.parts[places].tolist(), examples.rows[places].tolist(), strict=True):
            if part not in self._part_texts:
                self._part_texts[part] = texts_of(self.cache, self.cache.parts[part].name, self._texts)
            found.append(self._part_texts[part][row])
        return found

    def _batch(self, examples: np.ndarray, layers: LayerMap) -> Batch:
        joined = self.epochs.examples
        texts = self._texts_at(joined, examples)
        student = encode(self._student.tokenizer, texts, self._student.max_length)
        self._truncated += student.truncated_count, len(student)
        order = longest_first(student.lengths)
        examples, texts, student = examples[order], [texts[place] for place in order], student.select(order)
        targets = self._targets(texts, student, layers) if self._running and (self._logits or self.layer_map) else None
        (inputs,) = student_inputs(_sheets(student), int(self._student.tokenizer.pad_token_id or 0))
        return Batch(inputs, torch.from_numpy(joined.labels[examples]), joined.text_ids[examples], targets)

    def _targets(self, texts: Sequence[tuple[str, ...]], student: EncodedTexts, layers: LayerMap) -> Targets:
        logits: list[torch.Tensor] = []
        hidden: dict[tuple[int, int], Hidden] = {}
        for index, running in enumerate(self._running):
            encoded = encode(running.teacher.tokenizer, texts, running.teacher.max_length)
            output = running.run(encoded, np.arange(len(texts)), running.layers)
            logits.append(output.logits.clone())
            if running.layers:
                made = self._hidden(index, running, student, encoded, output)
                wanted = enumerate(layers[running.teacher.name], start=1)
                hidden |= {(index, layer): made[own] for layer, own in wanted if own is not None}
        return Targets(
            self.teachers, torch.stack(logits) if self._logits else torch.empty(len(logits), len(texts), 0), hidden
        )

    def _hidden(
        self, index: int, running: _Running, student: EncodedTexts, encoded: EncodedTexts, output: TeacherOutput
    ) -> dict[int, Hidden]:
        places: dict[str, Pieces] = {}
        made: dict[int, Hidden] = {}
        for layer in running.layers:
            stored = running.stored[layer]
            form, (values, scales) = stored.form, stored(output.hidden[layer], encoded.lengths)
            if form.tokens not in places:
                places[form.tokens] = self._pieces(
                    index, running, form, student, student_tokens(encoded), values.device
                )
            made[layer] = places[form.tokens].target(values, scales, form.decoder)
        return made

    def _pieces(
        self, index: int, running: _Running, form: Form, student: EncodedTexts, teacher: Tokens, device: torch.device
    ) -> Pieces:
        if form.tokens != "all":
            (pieces,) = text_pieces(form.tokens, _sheets(student))
            return pieces.to(device)
        same = running.same_tokens and np.array_equal(student.offsets, teacher.offsets)
        alignment = align(student_tokens(student), teacher, identical=same)
        self._covered[index] += int(alignment.covered.sum()), alignment.tokens
        _, (pieces,) = alignment_pieces(_sheets(student, TeacherPart(None, teacher.offsets, {}, alignment)), 0)
        return pieces.to(device)


def _sheets(student: EncodedTexts, *teachers: TeacherPart) -> Sheets:
    """A batch that is one part, whole and in order, and the only step."""
    count = len(student)
    rows = Rows([DecodedPart(student, teachers)], np.zeros(count, np.int64), np.arange(count), np.array([0, count]))
    return Sheets(rows)


def _check_same(cache: Cache, teacher: Teacher) -> None:
    stored, live = cache.teachers[teacher.name].fingerprints, teacher.fingerprints
    for piece in ("weights", "config", "head", "tokenizer"):
        if getattr(stored, piece) != getattr(live, piece):
            raise MismatchError(
                f"teacher '{teacher.name}' is not the one of cache '{cache.path}': {piece} "
                f"{getattr(live, piece)[:12]}, "
                f"in the cache {getattr(stored, piece)[:12]}",
                "Give the teachers that the cache was dumped from, or dump these into a new cache.",
            )
