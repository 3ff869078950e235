"""Batches with targets from a cache; no teacher runs.

Two threads put whole parts together, a few beyond the window from which batches are drawn; their layers are read,
checked and decoded by one thread per core. While the consumer works, one more thread makes batches and holds a short
queue of them. The order of rows is that of ``kdcache.loading.order``, so three integers (seed, epoch, step) are the
state of an epoch, and any machine can resume it. The reader checks a file's digest before its rows are used.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from kdcache.codecs.registry import format_of
from kdcache.loading.alignment import StudentTokens
from kdcache.loading.assembly import PaddedBatches, StepRows, cached_targets, distinct, student_inputs
from kdcache.loading.choice import (
    TargetChoice,
    chosen_window,
    even_layer_map,
    files_used,
    largest_max_length,
    stored_formats,
    target_dim,
)
from kdcache.loading.examples import join_examples, stored_logits
from kdcache.loading.joined import JoinedSource
from kdcache.loading.order import BatchSettings, distinct_parts
from kdcache.loading.parts import DecodedPart, PartDecoder, Texts
from kdcache.loading.prefetch import (
    READ_AHEAD,
    Balance,
    PartCache,
    PartLifetimes,
    PartWindow,
    bundled,
    closed_at_exit,
    layer_readers,
    runs_of_steps,
    where_it_pays,
)
from kdcache.loading.targets import Batch

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from transformers import PreTrainedTokenizerBase

    from kdcache.cache.reader import Cache
    from kdcache.loading.examples import ExamplesOf
    from kdcache.loading.order import Window
    from kdcache.loading.targets import Targets
    from kdcache.methods.parts.layer_map import LayerMap
    from kdcache.training.processes import Processes

MEMORY_BYTES = 2 << 30


class CachedBatches(JoinedSource):
    """A ``TargetSource`` over a cache.

    Args:
        cache: an open cache.
        student_tokenizer: a fast tokenizer; targets are aligned to its tokens.
        settings: batch size, order, and the share of this process.
        choice: teachers, their layers, and whether logits are read.
        splits: whose examples make up an epoch.
        examples: gives the rows of a split; the cache's own by default.
        texts: text id -> columns, in the place of the cache's texts.
        memory_bytes: bounds the decoded parts that are kept besides those in the window.
        background: False puts batches together in the caller's thread. By default a thread does it while the caller
            works with them, and the caller's thread while it does not. Parts are read ahead by threads either way.

    Raises:
        MismatchError: teachers, layers, splits or texts are not in the cache.
        RecipeError: layer maps of different lengths.
        DamageError: at once where a needed file is missing or has another size; from ``batches`` before a row of a
            file with other bytes is used.
    """

    def __init__(
        self,
        cache: Cache,
        student_tokenizer: PreTrainedTokenizerBase,
        settings: BatchSettings,
        choice: TargetChoice,
        *,
        splits: Sequence[str] = ("train",),
        examples: ExamplesOf | None = None,
        texts: Texts | None = None,
        memory_bytes: int = MEMORY_BYTES,
        background: bool = True,
    ) -> None:
        super().__init__(cache, settings, choice, splits, examples, texts)
        self._background, self._balance = background, Balance()
        parts = distinct_parts(self._examples.parts)
        cache.check_present(files_used(cache, parts, choice.teachers, choice.used, logits=choice.logits))
        self._pad_token_id = int(student_tokenizer.pad_token_id or 0)
        student = StudentTokens(student_tokenizer, settings.max_length)
        self._decode = PartDecoder(cache, student, choice.teachers, choice.used, choice.logits, texts)
        self._formats = stored_formats(cache, choice.used)
        self._part_cache: PartCache[DecodedPart] = PartCache(memory_bytes)
        self._covered: dict[int, list[tuple[int, int]]] = {}  # part -> per teacher: covered and all student tokens
        self._truncated: dict[int, tuple[int, int]] = {}  # part -> texts cut to max_length, and all texts

    @property
    def window_bytes(self) -> int:
        """An upper bound on decoded hidden states: window and read-ahead, full of the largest parts."""
        used = [(name, layer) for name, layers in self._choice.used.items() for layer in layers]
        specs = {key: self.cache.teachers[key[0]].layers[key[1]] for key in used}
        row_bytes = {key: format_of(spec).row_bytes(spec) for key, spec in specs.items()}
        parts = [self.cache.parts[index] for index in distinct_parts(self.epochs.parts)]
        sizes = [
            sum(self.cache.row_count(name, part.name, layer) * row_bytes[name, layer] for name, layer in used)
            for part in parts
            if part.scope == "full"
        ]
        window = self.epochs.settings.window
        held = len(sizes) if window == "all" else window + READ_AHEAD
        return sum(sorted(sizes, reverse=True)[:held])

    @property
    def coverage(self) -> dict[str, float]:
        """Per teacher with hidden states, the share of student tokens with a target, over the parts read so far."""
        seen = list(self._covered.values())
        totals = {
            name: np.array([part[index] for part in seen]).sum(axis=0)
            for index, name in enumerate(self.teachers)
            if seen
        }
        return {name: float(covered / tokens) for name, (covered, tokens) in totals.items() if tokens}

    @property
    def truncated(self) -> float | None:
        """Share of the texts that are cut to ``max_length``, over the parts read so far; None before any."""
        cut, texts = np.array([(0, 0), *list(self._truncated.values())]).sum(axis=0).tolist()
        return cut / texts if texts else None

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The share of process ``rank`` of every step of ``epoch`` from ``first_step`` on.

        Closing the iterator ends its threads.
        """
        walk = functools.partial(self._walk, epoch, first_step)
        bundles = closed_at_exit(where_it_pays(walk, self._balance) if self._background else walk())
        try:
            for bundle in bundles:
                yield from bundle
        finally:
            bundles.close()

    def count_together(self, processes: Processes) -> None:
        """From here on ``coverage`` and ``truncated`` are over the parts that any process read."""
        for covered, truncated in processes.gathered((self._covered, self._truncated)):
            self._covered, self._truncated = self._covered | covered, self._truncated | truncated

    def counted(self) -> tuple[dict[int, list[tuple[int, int]]], dict[int, tuple[int, int]]]:
        """What ``coverage`` and ``truncated`` are computed from, by part."""
        return dict(self._covered), dict(self._truncated)

    def count_on(self, counted: tuple[dict[int, list[tuple[int, int]]], dict[int, tuple[int, int]]]) -> None:
        """Add what ``counted`` gave before an interruption; a part that is read again counts once."""
        covered, truncated = counted
        self._covered.update(covered)
        self._truncated.update(truncated)

    def forget_parts(self) -> None:
        """Free the memory of decoded parts; they are read again when they are needed."""
        self._part_cache = PartCache(self._part_cache.limit)
        self._decode.memory.clear()

    def target_dim(self, teacher: str, layer: int) -> int:
        """Width of the stored targets of a teacher's layer."""
        return target_dim(self.cache, teacher, layer)

    def target_variance(self, teacher: str, layer: int) -> float:
        """Mean over dimensions of the variance over tokens of what is stored."""
        return self.cache.basis(teacher, layer).target_variance

    def logits_for(self, split: str) -> torch.Tensor:
        """The teachers' logits of every example of ``split`` in its order, [N, n, C] float32."""
        examples = join_examples(self.cache, self._examples_of, (split,))
        return torch.from_numpy(stored_logits(self.cache, self.teachers, examples))

    def _walk(self, epoch: int, first_step: int) -> Generator[list[Batch]]:
        order, layers = self.epochs.order(epoch), self.layers_at(epoch)
        mine, steps = self.epochs.shares(order, first_step)
        lifetimes = PartLifetimes.of(self.epochs.parts_of(mine), steps)
        del mine, steps  # as long as the data; the epoch is longer
        with ThreadPoolExecutor(layer_readers(), "kdcache-layer") as pool:
            window = PartWindow(lambda index: self._decoded(index, pool), self._part_cache, lifetimes)
            try:
                for together in runs_of_steps(first_step, self.epochs.steps_here(order, first_step).stop):
                    rows = [self.epochs.rows(order, step) for step in together]
                    yield from bundled(self._batches(rows, together, window, layers))
            finally:
                window.close()

    def _batches(
        self, steps: Sequence[np.ndarray], numbers: range, window: PartWindow[DecodedPart], layers: LayerMap
    ) -> Iterator[Batch]:
        """The batches of consecutive steps, looked up together: Python's overhead per call is paid once for all."""
        joined, examples = self._examples, np.concatenate(steps)
        parts, part_of = distinct(joined.parts[examples])
        edges = np.cumsum([0, *map(len, steps)])
        rows = StepRows(window.parts(numbers, parts.tolist()), part_of, joined.rows[examples], edges)
        order = rows.longest_first()
        padded, examples = PaddedBatches(rows.take(order)), examples[order]
        labels = padded.per_row(joined.labels[examples])
        text_ids = np.ascontiguousarray(padded.rows.text_records["id"])
        inputs = student_inputs(padded, self._pad_token_id)
        targets: Iterable[Targets | None] = itertools.repeat(None)
        if self._choice.has_targets:
            targets = cached_targets(padded, self.teachers, layers, self._formats)
        for step, (own, own_targets) in enumerate(zip(inputs, targets, strict=False)):
            yield Batch(own, labels[step], text_ids[edges[step] : edges[step + 1]], own_targets)

    def _decoded(self, index: int, pool: Executor) -> DecodedPart:
        part = self._decode(index, pool)
        alignments = [teacher.alignment for teacher in part.teachers]
        self._truncated[index] = (part.student.truncated_count, len(part.student))
        self._covered[index] = [(0, 0) if a is None else (int(a.covered.sum()), a.tokens) for a in alignments]
        return part


def loader(
    cache: Cache | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    batch_size: int = 32,
    student_layers: int | None = None,
    layer_map: Mapping[str, tuple[int | None, ...]] | None = None,
    max_length: int | None = None,
    teachers: Sequence[str] | None = None,
    with_transfer: bool = True,
    seed: int = 0,
    window: Window | None = None,
    missing: Literal["error", "skip"] = "error",
    rank: int = 0,
    world: int = 1,
    texts: Texts | None = None,
    memory_bytes: int = MEMORY_BYTES,
    background: bool = True,
) -> CachedBatches:
    """Batches of a cache for a student with ``tokenizer``: iterate ``loader(...).batches(epoch)``.

    A batch always has logits. It has hidden states where ``student_layers`` or ``layer_map`` is given; rows of transfer
    texts that are stored with logits only have none.

    Args:
        cache: an open cache, or its directory.
        tokenizer: the student's fast tokenizer; targets are aligned to its tokens.
        split: whose examples make up an epoch.
        batch_size: rows of a step over all ``world`` processes.
        student_layers: K; student layer j then learns from teacher layer round(j * depth / K), as dumps store them by
            default.
        layer_map: per teacher one of its stored layers for each student layer 1..K, or None for one without partner;
            takes the place of ``student_layers``.
        max_length: tokens that the student reads of a text; by default the largest of the teachers'.
        teachers: a subset of the cache's, in the order that batches have; all by default.
        with_transfer: whether transfer texts, which have no label (-1), are part of the epoch.
        seed: of the order of rows.
        window: from how many parts batches are drawn; ``"all"`` is a uniform shuffle, for which all parts are read
            first. By default 8, or fewer of the larger parts of a cache of over 4.2 million texts.
        missing: ``"skip"`` leaves out examples whose text the cache lacks.
        rank: this process; it takes its share of every step.
        world: how many processes there are.
        texts: text id -> columns, where the cache came without its texts.
        memory_bytes: bounds the decoded parts that are kept besides those in the window.
        background: False puts batches together in the caller's thread, whatever it does with them.

    Returns:
        A source of ``Batch``. ``batches(epoch, first_step)`` iterates over one epoch, ``steps_per_epoch`` counts its
        steps, ``logits_for(split)`` gives float32 [teachers, examples, classes].

    Raises:
        MismatchError: teachers, layers, splits or texts are not in the cache.
        RecipeError: a window, a share of a batch, or layer maps that are not possible.
        DamageError: a file of the cache is missing or damaged; ``batches`` raises it too, before a row of that file is
            used.
    """
    if isinstance(cache, str | Path):
        from kdcache.cache.reader import open_cache

        cache = open_cache(cache)
    names = tuple(cache.teachers if teachers is None else teachers)
    if layer_map is None:
        layer_map = {} if student_layers is None else even_layer_map(cache, names, student_layers)
    transfer = ("transfer",) if with_transfer and split != "transfer" and "transfer" in cache.splits else ()
    return CachedBatches(
        cache,
        tokenizer,
        BatchSettings(
            batch_size,
            largest_max_length(cache) if max_length is None else max_length,
            seed,
            chosen_window(cache) if window is None else window,
            missing,
            rank,
            world,
        ),
        TargetChoice(names, {name: tuple(layer_map[name]) for name in names if name in layer_map}),
        splits=(split, *transfer),
        texts=texts,
        memory_bytes=memory_bytes,
        background=background,
    )
