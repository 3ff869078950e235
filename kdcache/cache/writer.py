"""Writes a cache: lock it, find the components that exist, add the missing ones, publish.

    with open_writer(path, task, settings) as writer:
        writer.add_texts(full, logits_only)
        for missing in writer.declare_teacher(spec, tokenizer_json):
            writer.write_part(spec.name, missing.part, outputs=..., tokens=..., hidden=...)
        writer.write_examples("train", text_ids, labels, None)
        writer.publish(provenance)

Files are written first, then the commit record that lists them, and the manifest last. The same calls continue an
interrupted dump and extend a finished one. Meanwhile the old manifest stays valid: no file that it lists changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache import layout, tables
from kdcache.cache.bases import check_basis, decode_basis, encode_basis
from kdcache.cache.complete import complete_contents, unfinished_teachers
from kdcache.cache.contents import Contents, PartInfo, SplitInfo
from kdcache.cache.digests import CheckedFiles
from kdcache.cache.hidden import encode_layers
from kdcache.cache.manifest import Manifest, make_manifest
from kdcache.cache.opening import hold_lock, open_contents, refuse_links, refuse_other_directory
from kdcache.cache.selection import local_selection, selection_here, write_selection
from kdcache.cache.spec import needs_tokens
from kdcache.cache.stale import (
    check_teacher,
    existing_layers,
    has_any,
    published_layers,
    refuse_case_twin,
    refuse_partial_layers,
)  # fmt: skip
from kdcache.cache.texts import Part as Part
from kdcache.cache.texts import PartTask as PartTask
from kdcache.cache.texts import TextPlan, Texts
from kdcache.cache.tokens import check_outputs, check_tokens
from kdcache.errors import MismatchError
from kdcache.files import FileDigest, digest_bytes, write_file

if TYPE_CHECKING:
    import numpy as np

    from kdcache.cache.contents import Contents
    from kdcache.cache.digests import Arrivals
    from kdcache.cache.joint import Joint
    from kdcache.cache.journal import Journal
    from kdcache.cache.selection import LocalSelection
    from kdcache.cache.spec import Settings, TaskSpec, TeacherSpec
    from kdcache.cache.tokens import Outputs, Tokens
    from kdcache.codecs.base import Basis, HiddenBlock


@contextlib.contextmanager
def open_writer(
    path: str | Path,
    task: TaskSpec,
    settings: Settings,
    *,
    store_text: bool = True,
    repair: bool = False,
    arrivals: Arrivals | None = None,
) -> Iterator[CacheWriter]:
    """Open a cache directory for writing: a new one, an interrupted dump, or a finished cache to extend.

    Args:
        path: The directory; made if missing.
        task: Text columns and label names; must equal those of an existing cache.
        settings: Seed and part size; must equal those of an existing cache.
        store_text: Whether to store the texts; must equal that of an existing cache.
        repair: Verify all files first; damaged ones count as missing.
        arrivals: Fetches files of a partly pulled cache that the writer has to read.

    Raises:
        LockedError: Another process writes the cache.
        MismatchError: Task or settings differ, or a file that was not pulled has to be read.
        DamageError: A file of the cache is damaged.
        StorageError: The disk is full or not writable.
    """
    root = Path(path)
    refuse_other_directory(root)
    refuse_links(root)
    with hold_lock(root):
        base, contents, journal = open_contents(root, task, settings, store_text, repair)
        local = local_selection(root, base.contents) if base is not None else None
        yield CacheWriter(root, base, contents, journal, local, arrivals)


class CacheWriter:
    """A cache open for writing, made by ``open_writer``, or by ``Joint`` if other processes write it too.

    One thread at a time may write; others may read.
    """

    def __init__(
        self,
        root: Path,
        base: Manifest | None,
        contents: Contents,
        journal: Journal,
        local: LocalSelection | None = None,
        arrivals: Arrivals | None = None,
        joint: Joint | None = None,
    ) -> None:
        self.root = root
        self._local = local
        self._joint = joint
        self.base = base  # the manifest that this run started from
        self._identity = base.identity if base else ""
        self._contents = contents
        self._journal = journal
        self._fitted_on = (base.contents if base else contents).full_texts
        self._files = CheckedFiles(root, contents.files, local=local, arrivals=arrivals)
        self._texts = TextPlan(root, contents, journal, self._files)
        self._asked: dict[str, TeacherSpec] = {}

    @property
    def contents(self) -> Contents:
        """All that is published or committed. Only ``kdcache.cache`` changes it and the commit records."""
        return self._contents

    @property
    def journal(self) -> Journal:
        return self._journal

    @property
    def files(self) -> CheckedFiles:
        """The files of ``contents``; those of a working copy that are not here are fetched."""
        return self._files

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, old and new, in their order."""
        return tuple(Part(part.name, part.scope, self._texts.ids(part)) for part in self._contents.parts)

    def add_texts(self, full: Texts, *logits_only: Texts) -> None:
        """Assign new texts to new parts, in the seeded order; known texts keep their place.

        Each group of ``logits_only`` gets parts of its own: validation and test texts are then read without the others.
        A text of a 'logits' part that is now wanted in full goes into a new full part. With ``repair``, damaged text
        files are written again.
        """
        self._texts.add(full, *logits_only)

    def texts_of(self, part: Part) -> list[tuple[str, ...]]:
        """The texts of a part, in its order. Raises MismatchError if they were neither given nor stored."""
        return self._texts.texts(self._part(part.name))

    def give_ids(self, part: Part) -> None:
        """Set the ids of a part, instead of reading them from its file."""
        self._texts.give_ids(part)

    def declare_teacher(self, spec: TeacherSpec, tokenizer_json: str) -> tuple[PartTask, ...]:
        """Declare how a teacher is run; returns what is missing of it. Raises MismatchError if existing data differ.

        Existing layers that ``spec`` does not name stay; if they lack some texts, that is a MismatchError too.
        Existing data also decide whether the head runs in float32; ``contents`` has the result.
        """
        old = self._contents.teachers.get(spec.name)
        published = self.base.contents if self.base else None
        existing = existing_layers(self._contents, published, spec.name)
        if old is not None and (existing or has_any(self._contents, published, spec.name)):
            if (spec.encoder_precision, spec.compiled) == (old.encoder_precision, old.compiled):
                spec = replace(spec, precision=old.precision)
            in_manifest = published is not None and spec.name in published.teachers
            layers = published_layers(published, spec.name) if in_manifest else None
            check_teacher(self.root, old, spec, existing, published=layers)
            kept = {layer: old.layers[layer] for layer in existing}
            if existing and not spec.layers:
                spec = replace(spec, sample_texts=old.sample_texts)
        else:
            refuse_case_twin(self.root, self._contents, spec.name)
            kept = {}
        merged = replace(spec, layers=dict(sorted({**spec.layers, **kept}.items())))
        self._asked[spec.name] = replace(spec, layers=dict(spec.layers))
        self._write_teacher(merged, old, tokenizer_json)
        refuse_partial_layers(self.root, self._contents, published, spec)
        return self.missing(spec.name)

    def missing(self, name: str) -> tuple[PartTask, ...]:
        """The requested outputs and layers of a declared teacher that are missing, per part."""
        tasks = []
        for part in self._contents.parts:
            outputs = not self._contents.has_outputs(name, part)
            wanted = sorted(self._asked[name].layers) if part.scope == "full" else ()
            layers = tuple(layer for layer in wanted if not self._contents.has_layer(name, part, layer))
            if outputs or layers:
                tasks.append(PartTask(Part(part.name, part.scope, self._texts.ids(part)), outputs, layers))
        return tuple(tasks)

    def layers_with_basis(self, name: str) -> set[int]:
        """The layers of a declared teacher that have a basis."""
        return {
            layer for layer in self._contents.teachers[name].layers if layout.basis_file(name, layer) in self._files
        }

    def bases(self, name: str, layers: Collection[int] | None = None) -> dict[int, Basis]:
        """The existing bases of a declared teacher, by layer; only those of ``layers`` if given."""
        spec = self._contents.teachers[name]
        wanted = self.layers_with_basis(name) & set(spec.layers if layers is None else layers)
        return {
            layer: self._files.decode(
                layout.basis_file(name, layer), partial(decode_basis, spec=spec.layers[layer], width=spec.width)
            )
            for layer in sorted(wanted)
        }

    def fitting(self, name: str) -> AbstractContextManager[None]:
        """Be the only writer that fits bases of a teacher; bases that others wrote meanwhile are there in the block."""
        return self._turn(name, None)

    def write_bases(self, name: str, bases: Mapping[int, Basis]) -> None:
        """Add bases. Raises MismatchError if a layer has another one: hidden states depend on it."""
        spec = self._contents.teachers[name]
        for layer, basis in sorted(bases.items()):
            check_basis(basis, spec.layers[layer], spec.width)
            path, data = layout.basis_file(name, layer), encode_basis(basis)
            if path in self._files:
                if self._files.read(path) != data:
                    raise MismatchError(
                        f"layer {layer} of teacher '{name}' has another basis in cache '{self.root}'", "Use that one."
                    )
                continue
            self._journal.add_basis(name, layer, self._write({path: data}))

    def write_part(
        self,
        name: str,
        part: Part,
        *,
        outputs: Outputs | None,
        tokens: Tokens | None,
        hidden: Mapping[int, HiddenBlock],
    ) -> int:
        """Write the missing components of a teacher in a part, durably, then its commit record.

        Existing components stay. ``tokens`` are needed with hidden states per token. Returns the bytes written. Raises
        NonFiniteError (names text id and layer), ValueError (shapes contradict the declaration), StorageError.
        """
        with self._turn(name, part.name):
            return self._write_part(name, part, outputs, tokens, hidden)

    @contextlib.contextmanager
    def _turn(self, name: str, part: str | None) -> Iterator[None]:
        if self._joint is None:
            yield
            return
        with self._joint.turn(name, part):
            self._journal.read_again(self._contents, name, part)
            self._joint.check_current(self._journal)
            yield

    def _write_part(
        self, name: str, part: Part, outputs: Outputs | None, tokens: Tokens | None, hidden: Mapping[int, HiddenBlock]
    ) -> int:
        spec, info = self._contents.teachers[name], self._part(part.name)
        ids = self._texts.ids(info)
        if info.scope == "logits" and (hidden or tokens is not None):
            raise ValueError(f"{info.name} gets outputs alone: its scope is 'logits'")
        files: dict[str, Any] = {}
        if outputs is not None and not self._contents.has_outputs(name, info):
            check_outputs(outputs, spec, info.name, ids)
            files[layout.outputs_file(name, info.name)] = tables.encode_outputs(outputs)
        if tokens is not None:
            check_tokens(tokens, info.name, len(ids))
            files |= self._token_files(name, info, tokens)
        new = {layer: block for layer, block in hidden.items() if not self._contents.has_layer(name, info, layer)}
        if new:
            if tokens is None and needs_tokens({layer: spec.layers[layer] for layer in new}):
                raise ValueError(f"hidden states of {info.name} need the tokens that they belong to")
            files |= encode_layers(spec, info.name, ids, None if tokens is None else tokens.offsets, new)
        return self._commit_part(name, info, None if tokens is None else len(tokens.starts), files)

    def write_examples(
        self, split: str, text_ids: np.ndarray, labels: np.ndarray, groups: Sequence[str] | None
    ) -> None:
        """Set the examples of a split; they replace older ones when the cache is published."""
        if not layout.SPLIT_NAME.fullmatch(split):
            raise ValueError(f"'{split}' is not a name of a split")
        classes = len(self._contents.task.label_names)
        if labels.shape != (len(text_ids),) or (len(labels) and not -1 <= labels.min() <= labels.max() < classes):
            raise ValueError(f"labels of '{split}' must be {len(text_ids)} numbers from -1 to {classes - 1}")
        data = tables.encode_examples(text_ids, labels, groups)
        path = layout.examples_file(split, digest_bytes(data).sha256)
        info = SplitInfo(len(text_ids), path)
        if self._contents.splits.get(split) == info and path in self._files:
            return
        files = self._write({path: data})
        self._journal.add_split(split, info, files)
        self._contents.splits[split] = info

    def publish(self, provenance: Mapping[str, Any], card: Callable[[Manifest], str] | None = None) -> Manifest:
        """Write the card, then the manifest, and remove the commit records. Returns the manifest.

        If nothing changed, the manifest stays the same. A teacher or layer that this writer did not declare and that is
        not complete is left out; its records stay, and whoever declares it again continues. Raises MismatchError if a
        teacher lacks some of the new texts, KdcacheError if a declared teacher is incomplete.
        """
        published = self.base.contents if self.base else None
        contents = complete_contents(self.root, self._contents, published, self._asked)
        made = make_manifest(contents, provenance)
        manifest = self.base if self.base is not None and self.base.identity == made.identity else made
        if card is not None:
            write_file(self.root / layout.CARD, card(manifest).encode("utf-8"))
        if manifest is made:
            write_file(self.root / layout.MANIFEST, manifest.to_bytes())
        if self._local is not None:
            here = selection_here(self.root, manifest.contents)
            write_selection(self.root, here, origin=self._local.origin if manifest.identity == self._identity else "")
        unfinished = unfinished_teachers(self._contents, manifest.contents, self._fitted_on)
        self._journal.clear(keep=unfinished)
        if unfinished:
            self._journal.begin({"identity": manifest.identity, **contents.settings_record()})
        self.base = manifest
        return manifest

    def _write(self, files: Mapping[str, Any]) -> dict[str, FileDigest]:
        written = {path: write_file(self.root / path, data) for path, data in files.items()}
        self._contents.files.update(written)
        return written

    def _commit_part(self, name: str, part: PartInfo, tokens: int | None, files: Mapping[str, Any]) -> int:
        if not files:
            return 0
        written = self._write(files)
        self._journal.add_teacher_part(name, part.name, tokens, written)
        if tokens is not None:
            self._contents.tokens.setdefault(name, {})[part.name] = tokens
        return sum(digest.size for digest in written.values())

    def _token_files(self, name: str, part: PartInfo, tokens: Tokens) -> dict[str, bytes]:
        path, data = layout.tokens_file(name, part.name), tables.encode_tokens(tokens)
        if not self._contents.has_tokens(name, part):
            return {path: data}
        if self._contents.files[path].sha256 != digest_bytes(data).sha256:
            raise MismatchError(
                f"teacher '{name}' cuts {part.name} into other tokens than those in cache '{self.root}'",
                "Use the tokenizer that the cache was made with, or dump into a new directory.",
            )
        return {}

    def _write_teacher(self, spec: TeacherSpec, old: TeacherSpec | None, tokenizer_json: str) -> None:
        path, data = layout.tokenizer_file(spec.name), tokenizer_json.encode("utf-8")
        known = self._contents.files.get(path)
        same = known is not None and known.sha256 == digest_bytes(data).sha256
        if (
            old is not None
            and known is not None
            and not same
            and has_any(self._contents, self.base.contents if self.base else None, spec.name)
        ):
            raise MismatchError(
                f"cache '{self.root}' holds teacher '{spec.name}' with another tokenizer.json",
                "Use that tokenizer, give the teacher another name, or dump into a new directory.",
            )
        if same and old == spec:
            return
        files = {path: known} if same and known is not None else self._write({path: data})
        self._journal.add_teacher(spec, files)
        self._contents.teachers[spec.name] = spec

    def _part(self, name: str) -> PartInfo:
        place = layout.part_number(name)
        if place is not None and place < len(self._contents.parts) and self._contents.parts[place].name == name:
            return self._contents.parts[place]
        for part in self._contents.parts:  # a writer of one part knows no other one
            if part.name == name:
                return part
        raise ValueError(f"there is no {name} in cache '{self.root}'")
