"""Reads a cache: opens the manifest, then only the requested files.

    cache = kdcache.open_cache("runs/sst2/cache")
    cache.outputs("bert", "part-00000").logits

Opening reads only the manifest. Size and sha256 of a file are checked when this process first reads it, and the crc32c
of array chunks at every read. A missing, truncated or altered file raises a DamageError that names it. All methods are
thread-safe. The manifest determines the sizes of arrays, never a header in a file; arrays of Arrow files are read-only
views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache import layout, tables
from kdcache.cache.bases import decode_basis
from kdcache.cache.digests import CheckedFiles
from kdcache.cache.hidden import decode_layer
from kdcache.cache.ids import Examples
from kdcache.cache.manifest import Manifest, read_manifest
from kdcache.cache.places import TextPlaces
from kdcache.cache.selection import local_selection
from kdcache.cache.tokens import OTHER, Tokens
from kdcache.errors import MismatchError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    from kdcache.cache.contents import PartInfo, SplitInfo
    from kdcache.cache.digests import Arrivals
    from kdcache.cache.selection import LocalSelection, Selection
    from kdcache.cache.spec import Settings, TaskSpec, TeacherSpec
    from kdcache.cache.tokens import Outputs
    from kdcache.codecs.base import Basis, HiddenBlock, LayerSpec


def open_cache(path: str | Path, *, arrivals: Arrivals | None = None, incomplete: bool = False) -> Cache:
    """Open a cache directory for reading.

    Args:
        path: The directory, with a whole cache or a part of it (``.selection.json``).
        arrivals: Fetches files that are not here yet.
        incomplete: Accept a part that is not completely fetched.

    Returns:
        The open cache. Only its manifest was read.

    Raises:
        DamageError: The manifest or the selection is missing or damaged.
        MismatchError: The cache has a newer format, or selected files are not fetched yet.
    """
    root = Path(path)
    manifest = read_manifest(root)
    if arrivals is not None:
        return Cache(root, manifest, arrivals=arrivals)
    local = local_selection(root, manifest.contents)
    cache = Cache(root, manifest, local=local)
    if local is not None and not local.complete and not incomplete:
        cache.check_present(sorted(local.selection.covers(manifest.contents)))
    return cache


class Cache:
    """An open cache, made by ``open_cache``. Thread-safe."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        trust_earlier: bool = True,
        local: LocalSelection | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.local = local  # the part that is here; None: all of it
        self._arrivals = arrivals
        self._contents = manifest.contents
        self._files = CheckedFiles(
            path, manifest.contents.files, trust_earlier=trust_earlier, local=local, arrivals=arrivals
        )
        self._parts = {part.name: part for part in manifest.contents.parts}
        self._places = TextPlaces(manifest.contents.parts, self.text_ids)

    def __repr__(self) -> str:
        from kdcache.cache.shown import as_line

        return as_line(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: teachers and splits, from the manifest."""
        from kdcache.cache.shown import as_html

        return as_html(self)

    @property
    def identity(self) -> str:
        """sha256 (hex) of the content: caches with equal identities have equal data files."""
        return self.manifest.identity

    @property
    def task(self) -> TaskSpec:
        """Text columns and label names."""
        return self._contents.task

    @property
    def settings(self) -> Settings:
        """Seed and part size of the dump."""
        return self._contents.settings

    @property
    def teachers(self) -> dict[str, TeacherSpec]:
        """Specifications by teacher name."""
        return dict(self._contents.teachers)

    @property
    def parts(self) -> tuple[PartInfo, ...]:
        """Name, scope and number of texts of every part, in order."""
        return tuple(self._contents.parts)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._contents.splits)

    @property
    def has_text(self) -> bool:
        """Whether the texts themselves are stored."""
        return self._contents.has_text

    @property
    def has_text_here(self) -> bool:
        """Whether the texts are stored and in the part that was pulled."""
        return self.has_text and (self.local is None or self.local.selection.text)

    def examples(self, split: str) -> Examples:
        """The examples of a split. Raises MismatchError if there is no such split, DamageError."""
        info = self._split(split)
        classes = len(self.task.label_names)
        return Examples(
            *self._files.decode(info.file, lambda data: tables.decode_examples(data, info.examples, classes))
        )

    def example_count(self, split: str) -> int:
        """The number of examples of a split, from the manifest."""
        return self._split(split).examples

    def example_ids(self, split: str) -> Iterator[np.ndarray]:
        """The ids of ``examples``, ``uint8[m, 16]`` block by block, for splits that are too large to be in memory."""
        info = self._split(split)
        with self._files.naming(info.file):
            yield from tables.id_blocks(self._files.map(info.file), info.examples)

    def example_labels(self, split: str) -> np.ndarray:
        """The labels of ``examples`` in the smallest integers that hold them, for splits as in ``example_ids``."""
        info = self._split(split)
        with self._files.naming(info.file):
            return tables.compact_labels(self._files.map(info.file), info.examples, len(self.task.label_names))

    def text_ids(self, part_name: str) -> np.ndarray:
        """The text ids of a part, ``uint8[n, 16]``, in its order."""
        part = self._part(part_name)
        return self._files.decode(layout.ids_file(part.name), lambda data: tables.decode_ids(data, part.texts))

    def texts(self, part_name: str) -> list[tuple[str, ...]]:
        """The texts of a part, in its order: a tuple of columns each. Raises MismatchError if the cache stores none."""
        part = self._part(part_name)
        if not self.has_text:
            raise MismatchError(
                f"cache '{self.path}' was made without its texts", "Give the data that it was made from."
            )
        columns = self.task.text_columns
        return self._files.decode(
            layout.text_file(part.name), lambda data: tables.decode_text(data, columns, part.texts)
        )

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find texts by id.

        A text that is in a 'full' and in a 'logits' part is found in the full one. The first call reads all text ids;
        in a cache of many texts every call does. Millions are searched through temporary files of the home directory.

        Args:
            ids: ``uint8[m, 16]``.

        Returns:
            Index into ``parts`` and row in that part, both ``int32[m]``; -1 for a text that the cache lacks.
        """
        return self._places.locate(ids)

    def locate_blocks(self, blocks: Callable[[], Iterable[np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
        """``locate`` of ``count`` ids that come block by block; ``blocks`` may be called twice."""
        return self._places.locate_blocks(blocks, count)

    def outputs(self, teacher: str, part_name: str) -> Outputs:
        """Logits ``float32[n, classes]`` and pooled vectors ``float32[n, width]`` (or None) of a part."""
        spec, part = self._teacher(teacher), self._part(part_name)
        path = layout.outputs_file(teacher, part.name)
        return self._files.decode(
            path, lambda data: tables.decode_outputs(data, part.texts, spec.target.shape[0], spec.pooled)
        )

    def token_count(self, teacher: str, part_name: str) -> int:
        """The number of tokens of a part, from the manifest. Raises MismatchError if the part has no tokens."""
        self._teacher(teacher)
        counts = self._contents.tokens.get(teacher, {})
        part = self._part(part_name)
        if part.name not in counts:
            raise MismatchError(
                f"cache '{self.path}' has no tokens of teacher '{teacher}' in {part.name} (scope '{part.scope}')",
                "Hidden states and tokens are stored for train texts only, and for transfer texts up to "
                "dump.hidden_transfer.",
            )
        return counts[part.name]

    def row_count(self, teacher: str, part_name: str, layer: int) -> int:
        """Rows of a layer in a part: its tokens or its texts. Raises MismatchError if it has no hidden states."""
        spec, part = self._layer(teacher, layer), self._part(part_name)
        return part.texts if spec.per_text and part.scope == "full" else self.token_count(teacher, part_name)

    def tokens(self, teacher: str, part_name: str) -> Tokens:
        """Spans, segments and roles of the tokens of a part."""
        count, part = self.token_count(teacher, part_name), self._part(part_name)
        path = layout.tokens_file(teacher, part.name)
        tokens = self._files.decode(path, lambda data: tables.decode_tokens(data, part.texts, count))
        if count and not 0 <= tokens.roles.min() <= tokens.roles.max() <= OTHER:
            raise self._files.damage(path, "has a token of unknown role")
        if len(tokens) and tokens.lengths.max() > self._teacher(teacher).max_length:
            raise self._files.damage(
                path,
                f"has a text of {tokens.lengths.max()} tokens, the teacher reads {self._teacher(teacher).max_length}",
            )
        return tokens

    def hidden(self, teacher: str, part_name: str, layer: int, into: HiddenBlock | None = None) -> HiddenBlock:
        """Stored hidden states of one layer of a part: one row per token, or per text if ``LayerSpec.per_text``.

        ``into``: a block of ``row_count`` rows that takes them; its arrays may be fields of records.
        """
        spec, rows = self._layer(teacher, layer), self.row_count(teacher, part_name, layer)
        return decode_layer(self._files, teacher, part_name, layer, spec, rows, into)

    def basis(self, teacher: str, layer: int) -> Basis:
        """Projection, mean and variances of one layer."""
        spec, path = self._layer(teacher, layer), layout.basis_file(teacher, layer)
        return self._files.decode(path, lambda data: decode_basis(data, spec, self._teacher(teacher).width))

    def tokenizer_json(self, teacher: str) -> str:
        """The teacher's tokenizer.json, truncation and padding nulled."""
        self._teacher(teacher)
        return self._files.decode(layout.tokenizer_file(teacher), lambda data: data.decode("utf-8"))

    def to_arrow(self, split: str, teachers: Sequence[str] | None = None, *, text: bool | None = None) -> pa.Table:
        """A split as a table, one row per example, in the order of the split.

        Columns, as in an exported cache: the text columns; ``label`` (int64, null without a label); for each teacher
        ``logits_NAME`` (list of float32, one per class); ``row`` (int64, from 0); ``text_id`` (hex). The metadata
        describe them for ``datasets.Dataset(table)``.

        Args:
            split: its name, one of ``splits``.
            teachers: names; all if not given.
            text: whether to read the texts; if not given, where they are stored.

        Raises:
            MismatchError: the cache has no such split or teacher, or no texts.
            DamageError: a file is missing or damaged.
        """
        from kdcache.cache.frame import to_arrow

        return to_arrow(self, split, teachers, text=text)

    def to_batches(
        self, split: str, teachers: Sequence[str] | None = None, *, text: bool | None = None
    ) -> pa.RecordBatchReader:
        """As ``to_arrow``, read part by part while it is consumed; ``row`` gives the order of the split."""
        from kdcache.cache.frame import record_batches

        return record_batches(self, split, teachers, text=text)

    def to_pandas(self, split: str, teachers: Sequence[str] | None = None, *, text: bool | None = None) -> pd.DataFrame:
        """As ``to_arrow``; a row's logits are a numpy array. Raises RecipeError if pandas is not installed."""
        from kdcache.cache.frame import to_pandas

        return to_pandas(self, split, teachers, text=text)

    def check_present(self, paths: list[str]) -> None:
        """Check presence and size of files, by name in the manifest; files being fetched count as present.

        Raises DamageError, MismatchError (not pulled).
        """
        self._files.check_coming(paths)

    def is_here(self, path: str) -> bool:
        """Whether a file, by name in the manifest, is here with the right size. Raises DamageError."""
        return self._files.found(path) is not None

    @property
    def arrivals(self) -> Arrivals | None:
        """Fetches missing files of a read-through cache; else None."""
        return self._arrivals

    def select(self, selection: Selection) -> None:
        """Announce what will be needed; only a read-through cache uses it."""
        if self._arrivals is not None:
            self._arrivals.select(selection)

    def expect(self, paths: Sequence[str]) -> None:
        """Announce the order in which files will be read; only a read-through cache uses it."""
        if self._arrivals is not None:
            self._arrivals.expect(paths)

    def _split(self, name: str) -> SplitInfo:
        if name not in self._contents.splits:
            raise self._no("split", name, self._contents.splits)
        return self._contents.splits[name]

    def _part(self, name: str) -> PartInfo:
        if name not in self._parts:
            raise self._no("part", name, self._parts)
        return self._parts[name]

    def _teacher(self, name: str) -> TeacherSpec:
        if name not in self._contents.teachers:
            raise self._no("teacher", name, self._contents.teachers)
        return self._contents.teachers[name]

    def _layer(self, teacher: str, layer: int) -> LayerSpec:
        layers = self._teacher(teacher).layers
        if layer not in layers:
            raise self._no(f"layer of teacher '{teacher}'", layer, layers)
        return layers[layer]

    def _no(self, what: str, name: object, known: object) -> MismatchError:
        there = [str(item) for item in known][:20]  # type: ignore[attr-defined]
        return MismatchError(
            f"cache '{self.path}' has no {what} {name!r}; it has: {', '.join(there) or 'none'}", "Name one of these."
        )
