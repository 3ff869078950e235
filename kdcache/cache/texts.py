"""Divides the texts of a dump into parts, and restores damaged text files from the data of a recipe.

New texts are sorted by a keyed hash of their id and cut into parts. So the parts depend only on the set of texts and
the seed. Parts are recorded one by one, in order. After an interruption the remaining texts are cut into the same parts
as without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache import layout, tables
from kdcache.cache.contents import Contents, PartInfo
from kdcache.cache.ids import IdIndex, gather_ids, id_array, id_list, seeded_order, seeded_rows, text_id
from kdcache.cache.text_table import ids_of_texts, look_up
from kdcache.errors import DamageError, MismatchError
from kdcache.files import digest_bytes, write_file

if TYPE_CHECKING:
    from kdcache.cache.digests import CheckedFiles
    from kdcache.cache.journal import Journal
    from kdcache.cache.spec import Scope


Texts = Mapping[bytes, tuple[str, ...]]


class TextPlan:
    """The parts of a cache that is open for writing, with their ids, and their texts if these are given or stored."""

    def __init__(self, root: Path, contents: Contents, journal: Journal, files: CheckedFiles) -> None:
        self._root, self._contents, self._journal, self._files = root, contents, journal, files
        self._given: list[Texts] = []
        self._ids: dict[str, np.ndarray] = {}

    def ids(self, part: PartInfo) -> np.ndarray:
        """Ids of a part, ``uint8[n, 16]``."""
        if part.name not in self._ids:
            path = layout.ids_file(part.name)
            if path not in self._files:
                raise self._lost(path)
            self._ids[part.name] = self._files.decode(path, lambda data: tables.decode_ids(data, part.texts))
        return self._ids[part.name]

    def give_ids(self, part: Part) -> None:
        self._ids[part.name] = part.text_ids

    def texts(self, part: PartInfo) -> list[tuple[str, ...]]:
        """Texts of a part: as given to ``add``, else as stored."""
        given = self._given_texts(id_list(self.ids(part)))
        if len(given) == part.texts:
            return given
        if not self._contents.has_text:
            raise MismatchError(
                f"cache '{self._root}' does not store its texts, and {part.name} holds some that were not given",
                "Give the texts that it was made from, or dump into a new directory.",
            )
        return self._stored(part)

    def add(self, full: Texts, *logits_only: Texts) -> None:
        """Put new texts into new parts: first those with hidden states, then those with logits only.

        Each group of ``logits_only`` gets parts of its own.
        """
        self._given += [full, *logits_only]
        self._restore(full, logits_only)
        self._append("full", self._new(full, "full"))
        for group in logits_only:
            self._append("logits", self._new(group, "full", "logits"))

    def _stored(self, part: PartInfo) -> list[tuple[str, ...]]:
        columns = self._contents.task.text_columns
        return self._files.decode(
            layout.text_file(part.name), lambda data: tables.decode_text(data, columns, part.texts)
        )

    def _new(self, texts: Texts, *scopes: Scope) -> np.ndarray:
        """The ids of those ``texts`` that no part of ``scopes`` has."""
        ids = ids_of_texts(texts)
        known = [self.ids(part) for part in self._contents.parts if part.scope in scopes]
        return ids[IdIndex(np.concatenate(known)).find(ids) < 0] if known else ids

    def _append(self, scope: Scope, ids: np.ndarray) -> None:
        ordered = gather_ids(ids, seeded_rows(ids, self._contents.settings.seed))
        size = self._contents.settings.part_size
        for start in range(0, len(ordered), size):
            array = ordered[start : start + size]
            chunk = id_list(array)
            part = PartInfo(layout.part_name(len(self._contents.parts)), scope, len(chunk))
            self._check(chunk)
            files = {layout.ids_file(part.name): tables.encode_ids(array)}
            if self._contents.has_text:
                files[layout.text_file(part.name)] = self._encode_text(chunk)
            self._commit(part, files)
            self._contents.parts.append(part)
            self._ids[part.name] = array

    def _commit(self, part: PartInfo, files: Mapping[str, bytes]) -> None:
        self._contents.files.update({path: write_file(self._root / path, data) for path, data in files.items()})
        paths = (layout.ids_file(part.name), layout.text_file(part.name))
        self._journal.add_part(
            part, {path: self._contents.files[path] for path in paths if path in self._contents.files}
        )

    def _check(self, ids: Sequence[bytes]) -> None:
        columns = len(self._contents.task.text_columns)
        for identity, found in zip(ids, self._find(ids), strict=True):
            text = found or ()
            if len(text) != columns or text_id(text) != identity:
                raise ValueError(f"text {identity.hex()} is not the {columns} columns that its id is the hash of")

    def _encode_text(self, ids: Sequence[bytes]) -> bytes:
        return tables.encode_text(self._contents.task.text_columns, self._given_texts(ids))

    def _given_texts(self, ids: Sequence[bytes]) -> list[tuple[str, ...]]:
        """The texts of ``ids`` without those that were not given."""
        return [text for text in self._find(ids) if text is not None]

    def _find(self, ids: Sequence[bytes]) -> list[tuple[str, ...] | None]:
        """The given texts of ``ids``."""
        found: list[tuple[str, ...] | None] = [None] * len(ids)
        for given in self._given:
            open_ = [place for place, text in enumerate(found) if text is None]
            for place, text in zip(open_, look_up(given, [ids[place] for place in open_]), strict=True):
                found[place] = text
        return found

    def _restore(self, full: Texts, logits_only: Sequence[Texts]) -> None:
        """Write damaged text files again. Each must equal the old file, or targets would belong to other texts."""
        for part in self._contents.parts:
            if layout.ids_file(part.name) not in self._files and layout.text_file(part.name) in self._files:
                ids = id_array(map(text_id, self._stored(part)))
                self._restore_file(part, layout.ids_file(part.name), tables.encode_ids(ids))
        self._restore_plan("full", [full])
        self._restore_plan("logits", logits_only)
        for part in self._contents.parts:
            path = layout.text_file(part.name)
            if self._contents.has_text and path not in self._files:
                self._restore_file(part, path, self._encode_text(id_list(self.ids(part))))

    def _restore_plan(self, scope: Scope, groups: Sequence[Texts]) -> None:
        lost = [
            part
            for part in self._contents.parts
            if part.scope == scope and layout.ids_file(part.name) not in self._files
        ]
        if not lost:
            return
        whole = [part for part in self._contents.parts if layout.ids_file(part.name) in self._files]
        known = {identity for part in whole if part.scope in ("full", scope) for identity in id_list(self.ids(part))}
        left = [seeded_order(group.keys() - known, self._contents.settings.seed) for group in groups]
        for part in lost:
            self._restore_file(part, layout.ids_file(part.name), self._taken(part, left))

    def _taken(self, part: PartInfo, left: list[list[bytes]]) -> bytes:
        """The ids file of a lost part, whose texts are the next ones of a group; they are taken out of ``left``."""
        path, data = layout.ids_file(part.name), b""
        for place, ids in enumerate(left):
            data = tables.encode_ids(id_array(ids[: part.texts]))
            if digest_bytes(data) == self._contents.lost.get(path):
                left[place] = ids[part.texts :]
                break
        return data

    def _restore_file(self, part: PartInfo, path: str, data: bytes) -> None:
        if digest_bytes(data) != self._contents.lost.get(path):
            raise self._lost(path)
        self._commit(part, {path: data})

    def _lost(self, path: str) -> DamageError:
        return DamageError(
            f"'{self._root / path}' is damaged, and the texts that were given do not restore it",
            "Use the data that the cache was made from with --repair, or dump into a new directory.",
        )


@dataclass(frozen=True)
class Part:
    """Texts that are run together. Scope 'full' gets all components, 'logits' outputs only."""

    name: str
    scope: Scope
    text_ids: np.ndarray  # uint8[n, 16]


@dataclass(frozen=True)
class PartTask:
    """The missing components of one teacher in one part."""

    part: Part
    outputs: bool
    layers: tuple[int, ...]
