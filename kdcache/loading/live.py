"""Batches with targets from live teacher forward passes, the reference that cached batches are measured against.

Order, alignment and batch structure are those of ``CachedBatches``; only the values come from a forward pass. With
``projection = "none"`` and float32 the two agree to the rounding that different padding causes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.cache.spec import differing
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
from kdcache.loading.alignment import StudentTokens, align, student_tokens
from kdcache.loading.assembly import PaddedBatches, StepRows, longest_first, student_inputs, text_indices, token_indices
from kdcache.loading.choice import StoredFormat, target_dim
from kdcache.loading.examples import JoinedExamples, join_examples
from kdcache.loading.joined import JoinedSource
from kdcache.loading.parts import DecodedPart, TeacherPart, Texts, check_texts, texts_of
from kdcache.loading.targets import AlignmentIndices, Batch, Hidden, Targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdcache.cache.reader import Cache
    from kdcache.codecs.base import Encoder, TokenSelection
    from kdcache.loading.choice import TargetChoice
    from kdcache.loading.examples import ExamplesOf
    from kdcache.loading.order import BatchSettings
    from kdcache.methods.parts.layer_map import LayerMap
    from kdcache.teachers.backends import TeacherBackend, TeacherOutput
    from kdcache.teachers.folds import FoldLogits
    from kdcache.teachers.teacher import Teacher
    from kdcache.training.processes import Processes

_TOKENS_PER_PASS = 4096  # padded tokens of one forward pass over a split


@dataclass(frozen=True, eq=False)
class _Running:
    """A loaded teacher with its backend, and per layer the conversion of its hidden states to targets."""

    teacher: Teacher
    backend: TeacherBackend
    layers: tuple[int, ...]
    same_tokens: bool  # as the student's
    stored: Mapping[int, _Stored]

    def run(self, encoded: EncodedTexts, rows: np.ndarray, layers: Sequence[int]) -> TeacherOutput:
        return self.backend.run(pad(encoded, rows, padding_id(self.teacher.tokenizer)), layers, False)


@dataclass(frozen=True, eq=False)
class _Stored:
    """Turns a teacher's hidden states into the targets that a cache would give for one of its layers.

    ``encode`` is None for storage formats that only round: encoding and decoding again would cost time for nothing.
    """

    format: StoredFormat
    project: Projector | None  # None: states come at full width
    encode: Encoder | None

    def __call__(self, hidden: torch.Tensor, lengths: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values and scales [rows, ...], never tensors of inference mode: autograd cannot save those."""
        selected = select_tokens(hidden, lengths, self.format.tokens)
        projected = selected if self.project is None else self.project(selected)
        if self.encode is None:
            return (projected.clone() if projected.is_inference() else projected), None
        block = self.encode(projected)
        values, scales = (
            None if array is None else torch.from_numpy(array).to(hidden.device)
            for array in (block.values, block.scales)
        )
        assert values is not None
        return values, scales


class LiveBatches(JoinedSource):
    """A ``TargetSource`` whose teachers run on every batch. The cache gives texts, examples, order and variances.

    ``teachers`` are the loaded teachers of ``choice``, in its order. ``backends`` may say, per name, what runs them
    (torch in float32 by default). ``out_of_fold`` has, per name, the logits of train texts where those of the cache
    come from bundles that did not see these texts. With ``project`` hidden states go through the stored bases, else
    they come at full width. The other arguments, and the errors, are those of ``CachedBatches``; MismatchError too
    where a teacher is not the one that the cache was dumped from.
    """

    def __init__(
        self,
        cache: Cache,
        student_tokenizer: PreTrainedTokenizerBase,
        settings: BatchSettings,
        choice: TargetChoice,
        teachers: Sequence[Teacher],
        *,
        splits: Sequence[str] = ("train",),
        examples: ExamplesOf | None = None,
        texts: Texts | None = None,
        backends: Mapping[str, TeacherBackend] | None = None,
        out_of_fold: Mapping[str, FoldLogits] | None = None,
        project: bool = True,
    ) -> None:
        super().__init__(cache, settings, choice, splits, examples, texts)
        self._student = StudentTokens(student_tokenizer, settings.max_length)
        self._project = project
        self._running = [self._ready(teacher, (backends or {}).get(teacher.name)) for teacher in teachers]
        self._out_of_fold = out_of_fold or {}
        self._part_texts: dict[int, Sequence[tuple[str, ...]]] = {}
        self._covered = np.zeros((len(teachers), 2), np.int64)
        self._truncated = np.zeros(2, np.int64)  # rows cut to max_length, and all rows

    @property
    def coverage(self) -> dict[str, float]:
        """Per teacher with hidden states, the share of student tokens that have a target, over the batches so far."""
        pairs = zip(self.teachers, self._covered.tolist(), strict=True)
        return {name: covered / tokens for name, (covered, tokens) in pairs if tokens}

    @property
    def truncated(self) -> float | None:
        """Share of the rows that are cut to ``max_length``, over the batches so far; None before any."""
        cut, rows = self._truncated.tolist()
        return cut / rows if rows else None

    def count_together(self, processes: Processes) -> None:
        """From here on ``coverage`` and ``truncated`` are over the batches of all processes."""
        covered, truncated = zip(*processes.gathered((self._covered, self._truncated)), strict=True)
        self._covered, self._truncated = np.sum(covered, axis=0), np.sum(truncated, axis=0)

    def counted(self) -> tuple[list[list[int]], list[int]]:
        """What ``coverage`` and ``truncated`` are computed from."""
        return self._covered.tolist(), self._truncated.tolist()

    def count_on(self, counted: tuple[list[list[int]], list[int]]) -> None:
        """Add what ``counted`` gave before an interruption."""
        covered, truncated = counted
        self._covered += np.array(covered, np.int64).reshape(self._covered.shape)
        self._truncated += np.array(truncated, np.int64)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The share of process ``rank`` of every step of ``epoch`` from ``first_step`` on.

        Targets lie on the teachers' device.
        """
        order, layers = self.epochs.order(epoch), self.layers_at(epoch)
        for step in self.epochs.steps_here(order, first_step):
            yield self._batch(self.epochs.rows(order, step), layers)

    def target_dim(self, teacher: str, layer: int) -> int:
        """Width of the targets of a teacher's layer."""
        return target_dim(self.cache, teacher, layer) if self._project else self.cache.teachers[teacher].width

    def target_variance(self, teacher: str, layer: int) -> float:
        """Mean over dimensions of the variance over tokens of the target."""
        basis = self.cache.basis(teacher, layer)
        return basis.target_variance if self._project else basis.total_variance

    def logits_for(self, split: str) -> torch.Tensor:
        """The teachers' logits of every example of ``split`` in its order, [N, n, C] float32, in main memory."""
        examples = join_examples(self.cache, self._examples_of, (split,))
        check_texts(self.cache, self._texts, examples)
        texts = self._texts_at(examples, np.arange(len(examples)))
        found = torch.empty(len(self._running), len(examples), len(self.cache.task.label_names))
        for index, running in enumerate(self._running):
            encoded = encode(running.teacher.tokenizer, texts, running.teacher.max_length)
            for rows in token_budget_batches(encoded.lengths, _TOKENS_PER_PASS):
                logits = running.run(encoded, rows, ()).logits
                found[index, torch.from_numpy(rows)] = self._unseen(running, logits, examples.text_ids[rows]).cpu()
        return found

    def _ready(self, teacher: Teacher, backend: TeacherBackend | None) -> _Running:
        from kdcache.teachers.backends.torch_backend import TorchBackend

        changed = differing(self.cache.teachers[teacher.name].fingerprints, teacher.fingerprints)
        if changed:
            raise MismatchError(
                f"teacher '{teacher.name}' is not the one of cache '{self.cache.path}': {changed}",
                "Give the teachers that the cache was dumped from, or dump these into a new cache.",
            )
        teacher = replace(teacher, max_length=self.cache.teachers[teacher.name].max_length)  # as the dump cut texts
        layers = self._choice.used.get(teacher.name, ())
        same = self._student.agrees_with(tokenizer_fingerprint(teacher.tokenizer), teacher.max_length, TRUNCATION)
        backend = backend or TorchBackend(teacher, precision="float32")
        stored = {layer: self._stored(teacher.name, layer, backend.device) for layer in layers}
        return _Running(teacher, backend, layers, same, stored)

    def _stored(self, teacher: str, layer: int, device: str) -> _Stored:
        spec = self.cache.teachers[teacher].layers[layer]
        if not self._project:
            return _Stored(StoredFormat(spec.tokens), None, None)
        storage, basis = format_of(spec), self.cache.basis(teacher, layer)
        if not storage.coarse:
            return _Stored(StoredFormat(spec.tokens), Projector(basis, device), None)
        return _Stored(
            StoredFormat(spec.tokens, storage.decoder(basis)),
            Projector(basis, device),
            storage.encoder(spec, basis, device),
        )

    def _unseen(self, running: _Running, logits: torch.Tensor, text_ids: np.ndarray) -> torch.Tensor:
        """``logits`` [n, C]; those of train texts from the bundle that did not see them, where there are folds."""
        folds = self._out_of_fold.get(running.teacher.name)
        if folds is None:
            return logits
        return torch.from_numpy(folds.instead_of(logits.float().cpu().numpy(), text_ids)).to(logits.device)

    def _texts_at(self, examples: JoinedExamples, places: np.ndarray) -> list[tuple[str, ...]]:
        found = []
        for part, row in zip(examples.parts[places].tolist(), examples.rows[places].tolist(), strict=True):
            if part not in self._part_texts:
                self._part_texts[part] = texts_of(self.cache, self.cache.parts[part].name, self._texts)
            found.append(self._part_texts[part][row])
        return found

    def _batch(self, examples: np.ndarray, layers: LayerMap) -> Batch:
        joined = self._examples
        texts = self._texts_at(joined, examples)
        student = encode(self._student.tokenizer, texts, self._student.max_length)
        self._truncated += student.truncated_count, len(student)
        order = longest_first(student.lengths)
        examples, texts, student = examples[order], [texts[place] for place in order], student.select(order)
        logits_only = None if joined.logits_only is None else joined.logits_only[examples]
        ids = joined.text_ids[examples]
        targets = self._targets(texts, student, logits_only, layers, ids) if self._choice.has_targets else None
        (inputs,) = student_inputs(_one_step(student), int(self._student.tokenizer.pad_token_id or 0))
        return Batch(inputs, torch.from_numpy(joined.labels[examples]), ids, targets)

    def _targets(
        self,
        texts: Sequence[tuple[str, ...]],
        student: EncodedTexts,
        logits_only: np.ndarray | None,
        layers: LayerMap,
        text_ids: np.ndarray,
    ) -> Targets:
        """The targets of ``texts``; those where ``logits_only`` [rows] is true get no hidden states."""
        logits: list[torch.Tensor] = []
        hidden: dict[tuple[int, int], Hidden] = {}
        for index, running in enumerate(self._running):
            encoded = encode(running.teacher.tokenizer, texts, running.teacher.max_length)
            output = running.run(encoded, np.arange(len(texts)), running.layers)
            logits.append(self._unseen(running, output.logits.clone(), text_ids))
            if running.layers:
                made = self._hidden(index, running, student, encoded, logits_only, output)
                wanted = enumerate(layers[running.teacher.name], start=1)
                hidden |= {(index, layer): made[own] for layer, own in wanted if own is not None}
        return Targets(
            self.teachers,
            torch.stack(logits) if self._choice.logits else torch.empty(len(logits), len(texts), 0),
            hidden,
        )

    def _hidden(
        self,
        index: int,
        running: _Running,
        student: EncodedTexts,
        encoded: EncodedTexts,
        logits_only: np.ndarray | None,
        output: TeacherOutput,
    ) -> dict[int, Hidden]:
        alignments: dict[TokenSelection, AlignmentIndices] = {}
        hidden: dict[int, Hidden] = {}
        kept = encoded if logits_only is None else encoded.select(np.flatnonzero(~logits_only))
        for layer in running.layers:
            stored, states = running.stored[layer], output.hidden[layer]
            if logits_only is not None:
                states = states[torch.from_numpy(np.repeat(~logits_only, encoded.lengths)).to(states.device)]
            tokens, (values, scales) = stored.format.tokens, stored(states, kept.lengths)
            if tokens not in alignments:
                indices = self._alignment(index, running, tokens, student, kept, logits_only)
                alignments[tokens] = indices.to(values.device)
            hidden[layer] = alignments[tokens].target(values, scales, stored.format.decoder)
        return hidden

    def _alignment(
        self,
        index: int,
        running: _Running,
        tokens: TokenSelection,
        student: EncodedTexts,
        teacher: EncodedTexts,
        logits_only: np.ndarray | None,
    ) -> AlignmentIndices:
        """``teacher``: the teacher's tokens of the rows with hidden states."""
        if tokens != "all":
            (indices,) = text_indices(tokens, _one_step(student, logits_only))
            return indices
        with_hidden = student if logits_only is None else student.select(np.flatnonzero(~logits_only))
        same = running.same_tokens and np.array_equal(with_hidden.offsets, teacher.offsets)
        alignment = align(student_tokens(with_hidden), student_tokens(teacher), identical=same)
        self._covered[index] += int(alignment.covered.sum()), alignment.tokens
        step = _one_step(student, logits_only, TeacherPart(None, teacher.offsets, {}, alignment))
        _, (indices,) = token_indices(step, 0)
        return indices


def _one_step(
    student: EncodedTexts, logits_only: np.ndarray | None = None, teacher: TeacherPart | None = None
) -> PaddedBatches:
    """One step whose rows are the texts of ``student``, in order.

    ``teacher`` has the tokens of the rows with hidden states; the others are a part of their own.
    """
    count = len(student)
    edges, teachers = np.array([0, count]), () if teacher is None else (teacher,)
    if logits_only is None:
        part = DecodedPart(student, teachers)
        return PaddedBatches(StepRows([part], np.zeros(count, np.int64), np.arange(count), edges))
    rows = [np.flatnonzero(~logits_only), np.flatnonzero(logits_only)]
    nothing = TeacherPart(None, np.zeros(len(rows[1]) + 1, np.int64), {}, None)
    parts = [
        DecodedPart(student.select(rows[0]), teachers),
        DecodedPart(student.select(rows[1]), (nothing,) * len(teachers), logits_only=True),
    ]
    places = np.empty(count, np.int64)
    for own in rows:
        places[own] = np.arange(len(own))
    return PaddedBatches(StepRows(parts, logits_only.astype(np.int64), places, edges))
