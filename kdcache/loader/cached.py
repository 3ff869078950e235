"""Batches with cached targets: what a student's training step needs, without a teacher in sight.

Whole parts are read and decoded in the background, a few beyond the window from which batches are drawn; batches are
put together in one more thread and wait in a short queue. The order is that of ``kdcache.loader.order``, so the state
of an epoch is three integers and any machine continues it. Every file's digest is checked by the reader before its rows
are used.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from kdcache.cache import layout
from kdcache.codecs.registry import format_of
from kdcache.loader.alignment import StudentTokens
from kdcache.loader.assembly import Rows, Sheets, cached_targets, numbered, student_inputs
from kdcache.loader.choice import (
    chosen_teachers,
    even_layer_map,
    files_used,
    largest_max_length,
    splits_of,
    stored_forms,
    target_dim,
)
from kdcache.loader.examples import join_examples
from kdcache.loader.order import Epochs
from kdcache.loader.parts import DecodedPart, PartDecoder, Texts, check_texts
from kdcache.loader.prefetch import READ_AHEAD, PartWindow, Shelf, Timetable, bundled, in_background, runs_of_steps
from kdcache.loader.targets import Batch
from kdcache.methods.parts.layer_map import LayerMap, LayersOfEpoch, layers_read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdcache.cache.reader import Cache
    from kdcache.loader.order import Window

MEMORY_BYTES = 2 << 30


class CachedBatches:
    """A ``TargetSource`` over a cache.

    ``split`` (and 'transfer' with it, where the cache has it and ``with_transfer``) says which examples; ``teachers``
    is any subset of the cache's, in the order given. ``layer_map`` gives per teacher one of its stored layers for each
    student layer 1..K, or None for one without partner, and is read where ``hidden``; with ``layers_at`` (epoch ->
    layer map) it names instead all layers that any epoch uses. ``logits=False`` reads no logits. ``max_length`` is the
    student's, in tokens. ``missing='skip'`` leaves out examples whose text the cache lacks. ``texts`` (id -> columns)
    replaces the cache's own. ``window``: from how many parts batches are drawn; 'all' is a uniform shuffle, for which
    all parts are read first. ``batch_size`` is that of the step over all ``world`` processes; this one takes share
    ``rank``. ``memory_bytes`` bounds what stays decoded besides the parts in the window. ``background=False`` puts
    batches together in the caller's thread: the most batches per second, if nothing else is done with them; parts are
    read ahead by threads all the same.

    Raises MismatchError where teachers, layers, splits or texts are not in the cache, and DamageError: at once where a
    file that will be used is missing or has another size, from ``batches`` before a row of a file with other bytes is
    used.
    """

    def __init__(
        self,
        cache: Cache,
        student_tokenizer: PreTrainedTokenizerBase,
        split: str = "train",
        with_transfer: bool = True,
        *,
        batch_size: int,
        max_length: int,
        teachers: Sequence[str] | None = None,
        layer_map: Mapping[str, tuple[int | None, ...]] | None = None,
        layers_at: LayersOfEpoch | None = None,
        seed: int = 0,
        window: Window = 8,
        missing: Literal["error", "skip"] = "error",
        hidden: bool = False,
        logits: bool = True,
        rank: int = 0,
        world: int = 1,
        texts: Texts | None = None,
        memory_bytes: int = MEMORY_BYTES,
        background: bool = True,
    ) -> None:
        self.cache = cache
        self.teachers, self.layer_map = chosen_teachers(
            cache, teachers, layer_map if hidden else None, taking_turns=layers_at is not None
        )
        self._layers_at = layers_at
        self._used = {name: layers_read(layers) for name, layers in self.layer_map.items()}
        examples = join_examples(
            cache, splits_of(cache, split, with_transfer), missing=missing, hidden=bool(self.layer_map)
        )
        check_texts(cache, texts, examples)
        self.skipped = examples.skipped
        self.epochs = Epochs(examples, batch_size, seed, window, rank, world)
        parts = np.unique(examples.parts).tolist()
        cache.check_present(files_used(cache, parts, self.teachers, self._used, logits=logits))
        self._logits, self._background = logits, background
        self._pad_token_id = int(student_tokenizer.pad_token_id or 0)
        student = StudentTokens(student_tokenizer, max_length)
        self._decode = PartDecoder(cache, student, self.teachers, self._used, logits, texts)
        self._forms = stored_forms(cache, self._used)
        self._has_targets = bool(self.teachers) and (logits or bool(self.layer_map))
        self._shelf: Shelf[DecodedPart] = Shelf(memory_bytes)
        self._covered: dict[int, list[tuple[int, int]]] = {}  # part -> per teacher: covered and all student tokens
        self._truncated: dict[int, tuple[int, int]] = {}  # part -> texts that the student reads cut, and all of them

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, the same in every process."""
        return self.epochs.steps

    @property
    def window_bytes(self) -> int:
        """Bytes of hidden states that are decoded at once.

        Of the largest parts, as many as the window and reading ahead hold.
        """
        used = [(name, layer) for name, layers in self._used.items() for layer in layers]
        specs = {key: self.cache.teachers[key[0]].layers[key[1]] for key in used}
        row_bytes = {key: format_of(spec).row_bytes(spec) for key, spec in specs.items()}
        parts = [self.cache.parts[index].name for index in np.unique(self.epochs.examples.parts).tolist()]
        sizes = [
            sum(self.cache.row_count(name, part, layer) * row_bytes[name, layer] for name, layer in used)
            for part in parts
        ]
        held = len(sizes) if self.epochs.window == "all" else self.epochs.window + READ_AHEAD
        return sum(sorted(sizes, reverse=True)[:held])

    @property
    def coverage(self) -> dict[str, float]:
        """Per teacher with hidden states, the share of student tokens that have a target, over the parts read so far."""
        seen = list(self._covered.values())
        totals = {
            name: np.array([part[index] for part in seen]).sum(axis=0)
            for index, name in enumerate(self.teachers)
            if seen
        }
        return {name: float(covered / tokens) for name, (covered, tokens) in totals.items() if tokens}

    @property
    def truncated(self) -> float | None:
        """Share of the texts that the student reads cut to ``max_length``, over the parts read so far.

        None before any.
        """
        cut, texts = np.array([(0, 0), *list(self._truncated.values())]).sum(axis=0).tolist()
        return cut / texts if texts else None

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The share of process ``rank`` of every step of ``epoch`` from ``first_step`` on.

        Closing the iterator ends its threads.
        """
        walk = functools.partial(self._walk, epoch, first_step)
        bundles = in_background(walk) if self._background else walk()
        try:
            for bundle in bundles:
                yield from bundle
        finally:
            bundles.close()

    def layers_at(self, epoch: int) -> LayerMap:
        """The layer map of an epoch."""
        return self.layer_map if self._layers_at is None else self._layers_at(epoch)

    def target_dim(self, teacher: str, layer: int) -> int:
        """Width of the stored targets of a teacher's layer."""
        return target_dim(self.cache, teacher, layer)

    def target_variance(self, teacher: str, layer: int) -> float:
        """Mean over dimensions of the variance over tokens of what is stored."""
        return self.cache.basis(teacher, layer).target_variance

    def logits_for(self, split: str) -> torch.Tensor:
        """The teachers' logits of every example of ``split`` in its order, [N, n, C] float32."""
        return cached_logits(self.cache, self.teachers, split)

    def _walk(self, epoch: int, first_step: int) -> Generator[list[Batch]]:
        order, layers = self.epochs.order(epoch), self.layers_at(epoch)
        mine, steps = self.epochs.shares(order, first_step)
        timetable = Timetable.of(self.epochs.examples.parts[mine], steps)
        del mine, steps  # as long as the data; the epoch is longer
        window = PartWindow(self._decoded, self._shelf, timetable)
        try:
            for together in runs_of_steps(first_step, self.steps_per_epoch):
                rows = [self.epochs.rows(order, step) for step in together]
                yield from bundled(self._batches(rows, together, window, layers))
        finally:
            window.close()

    def _batches(
        self, steps: Sequence[np.ndarray], numbers: range, window: PartWindow[DecodedPart], layers: LayerMap
    ) -> Iterator[Batch]:
        """The batches of consecutive steps.

        Looked up together, since what Python spends is spent once for all of them.
        """
        joined, examples = self.epochs.examples, np.concatenate(steps)
        parts, part_of = numbered(joined.parts[examples])
        edges = np.cumsum([0, *map(len, steps)])
        rows = Rows(window.parts(numbers, parts.tolist()), part_of, joined.rows[examples], edges)
        order = rows.longest_first()
        sheets, examples = Sheets(rows.take(order)), examples[order]
        labels = sheets.per_row(joined.labels[examples])
        text_ids = np.ascontiguousarray(sheets.rows.cards["id"])
        inputs, nothing = student_inputs(sheets, self._pad_token_id), itertools.repeat(None)
        targets = cached_targets(sheets, self.teachers, layers, self._forms) if self._has_targets else nothing
        for step, (own, said) in enumerate(zip(inputs, targets, strict=False)):
            yield Batch(own, labels[step], text_ids[edges[step] : edges[step + 1]], said)

    def _decoded(self, index: int) -> DecodedPart:
        part = self._decode(index)
        alignments = [teacher.alignment for teacher in part.teachers]
        self._truncated[index] = (part.student.truncated_count, len(part.student))
        self._covered[index] = [(0, 0) if one is None else (int(one.covered.sum()), one.tokens) for one in alignments]
        return part


def cached_logits(cache: Cache, teachers: Sequence[str], split: str) -> torch.Tensor:
    """Logits of every example of ``split`` in its order, [N, n, C] float32.

    MismatchError where a text is not in the cache.
    """
    examples = join_examples(cache, (split,))
    places = [cache.parts[part].name for part in np.unique(examples.parts)]
    cache.expect([layout.outputs_file(teacher, part) for teacher in teachers for part in places])
    tables = []
    for teacher in teachers:
        table = np.empty((len(examples), len(cache.task.label_names)), np.float32)
        for part in np.unique(examples.parts).tolist():
            mine = examples.parts == part
            table[mine] = cache.outputs(teacher, cache.parts[part].name).logits[examples.rows[mine]]
        tables.append(table)
    shape = (len(tables), len(examples), len(cache.task.label_names))
    return torch.from_numpy(np.stack(tables)) if tables else torch.empty(shape)


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
    window: Window = 8,
    missing: Literal["error", "skip"] = "error",
    rank: int = 0,
    world: int = 1,
    texts: Texts | None = None,
    memory_bytes: int = MEMORY_BYTES,
    background: bool = True,
) -> CachedBatches:
    """Batches of a cache for a student with ``tokenizer``: iterate ``loader(...).batches(epoch)``.

    Logits always come along. Hidden states do where ``student_layers`` = K is given, by the map g(j) = j * depth / K
    that dumps use by default, or where ``layer_map`` says which of each teacher's layers student layer 1..K learns
    from. ``max_length`` is that of the teachers where not given. Errors are those of ``CachedBatches``.
    """
    if isinstance(cache, str | Path):
        from kdcache.cache.reader import open_cache

        cache = open_cache(cache)
    if layer_map is None and student_layers is not None:
        layer_map = even_layer_map(cache, teachers, student_layers)
    return CachedBatches(
        cache,
        tokenizer,
        split,
        with_transfer,
        batch_size=batch_size,
        max_length=largest_max_length(cache) if max_length is None else max_length,
        teachers=teachers,
        layer_map=layer_map,
        seed=seed,
        window=window,
        missing=missing,
        hidden=layer_map is not None,
        rank=rank,
        world=world,
        texts=texts,
        memory_bytes=memory_bytes,
        background=background,
    )
