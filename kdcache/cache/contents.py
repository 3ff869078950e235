"""The contents of a cache: the manifest without provenance, identity and checksum.

A writer starts with the contents of a manifest and of commit records, and adds to them; publishing makes the next
manifest of them. A component (the outputs of a part, one layer of a part) exists if all its files are listed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kdcache.cache import layout
from kdcache.cache.arrays import array_metadata, group_metadata, shard_bytes
from kdcache.codecs.registry import format_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kdcache.cache.spec import Scope, Settings, TaskSpec, TeacherSpec
    from kdcache.codecs.base import LayerSpec
    from kdcache.files import FileDigest


@dataclass(frozen=True)
class PartInfo:
    """A part: texts that are run together; it has one file of each kind."""

    name: str
    scope: Scope
    texts: int


@dataclass(frozen=True)
class SplitInfo:
    """A split: the number of examples, and their file."""

    examples: int
    file: str


class Expected(NamedTuple):
    """A file that contents imply. Its bytes or its size may follow from the rest of the manifest."""

    what: str  # its component, for messages
    most: int = 0  # bytes that it has at most, if it is read whole
    data: bytes | None = None  # its only possible bytes
    size: int | None = None  # its only possible size
    array: str = ""  # dtype and shape of the array that it belongs to, for messages


_FRAME = 1 << 16  # bytes of schema, header and padding
_EXAMPLE = 1100  # bytes of a row: id, label, and a group of a thousand characters on average
_TOKENIZER = 1 << 28
_TEXT = 1 << 31  # bytes of the texts of a part


@dataclass
class Contents:
    """Everything that the identity of a cache covers."""

    task: TaskSpec
    settings: Settings
    has_text: bool
    parts: list[PartInfo] = field(default_factory=list)
    splits: dict[str, SplitInfo] = field(default_factory=dict)
    teachers: dict[str, TeacherSpec] = field(default_factory=dict)
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)  # teacher -> part -> tokens
    files: dict[str, FileDigest] = field(default_factory=dict)
    lost: dict[str, FileDigest] = field(default_factory=dict)  # found damaged: to be written again

    def copy(self) -> Contents:
        """A copy that can be changed independently."""
        tokens = {name: dict(parts) for name, parts in self.tokens.items()}
        return Contents(
            self.task, self.settings, self.has_text, list(self.parts), dict(self.splits), dict(self.teachers), tokens,
            dict(self.files), dict(self.lost),
        )  # fmt: skip

    def settings_record(self) -> dict[str, Any]:
        """Everything that cannot change after the first dump, as plain JSON values."""
        values = {**vars(self.task), **vars(self.settings), "text": "stored" if self.has_text else "absent"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def full_texts(self) -> int:
        """The number of texts with hidden states."""
        return sum(part.texts for part in self.parts if part.scope == "full")

    def has_outputs(self, teacher: str, part: PartInfo) -> bool:
        return layout.outputs_file(teacher, part.name) in self.files

    def has_tokens(self, teacher: str, part: PartInfo) -> bool:
        return part.name in self.tokens.get(teacher, {}) and layout.tokens_file(teacher, part.name) in self.files

    def has_layer(self, teacher: str, part: PartInfo, layer: int) -> bool:
        spec = self.teachers[teacher].layers[layer]
        rows = self.rows(teacher, part, spec)
        if rows is None or layout.group_file(teacher, part.name) not in self.files:
            return False
        paths = layout.layer_files(teacher, part.name, layer, spec, rows)
        return all(path in self.files for path in paths) and (spec.per_text or self.has_tokens(teacher, part))

    def rows(self, teacher: str, part: PartInfo, spec: LayerSpec) -> int | None:
        """Rows of a layer in a full part: its texts, or its tokens (None if unknown)."""
        return part.texts if spec.per_text else self.tokens.get(teacher, {}).get(part.name)

    def layer_is_complete(self, teacher: str, layer: int) -> bool:
        """Whether a layer has its basis and all full parts."""
        full = (part for part in self.parts if part.scope == "full")
        return layout.basis_file(teacher, layer) in self.files and all(
            self.has_layer(teacher, part, layer) for part in full
        )

    def teacher_is_complete(self, teacher: str) -> bool:
        """Whether a teacher has its tokenizer and the outputs of all parts; layers are not considered."""
        has_tokenizer = layout.tokenizer_file(teacher) in self.files
        return has_tokenizer and all(self.has_outputs(teacher, part) for part in self.parts)

    def expected_files(self) -> dict[str, Expected]:
        """Every file of these contents, by path."""
        expected = {
            split.file: Expected(f"examples of '{name}'", _EXAMPLE * split.examples + _FRAME)
            for name, split in self.splits.items()
        }
        for part in self.parts:
            expected[layout.ids_file(part.name)] = Expected(f"text ids of {part.name}", 16 * part.texts + _FRAME)
            if self.has_text:
                expected[layout.text_file(part.name)] = Expected(f"text of {part.name}", _TEXT)
        for name, teacher in self.teachers.items():
            expected[layout.tokenizer_file(name)] = Expected(f"tokenizer of teacher '{name}'", _TOKENIZER)
            for layer, spec in teacher.layers.items():
                values = spec.dim * teacher.width + teacher.width + spec.dim
                expected[layout.basis_file(name, layer)] = Expected(
                    f"basis of layer {layer} of teacher '{name}'", 4 * values + _FRAME + format_of(spec).basis_bytes
                )
            for part in self.parts:
                expected.update(self._part_files(teacher, part))
        return expected

    def _part_files(self, teacher: TeacherSpec, part: PartInfo) -> Iterator[tuple[str, Expected]]:
        where = f"teacher '{teacher.name}', {part.name}"
        row_bytes = 4 * (teacher.target.shape[0] + (teacher.pooled or 0))
        outputs = Expected(f"outputs of {where}", row_bytes * part.texts + _FRAME)
        yield layout.outputs_file(teacher.name, part.name), outputs
        tokens = self.tokens.get(teacher.name, {}).get(part.name)
        if tokens is not None:
            most = 10 * tokens + 4 * part.texts + _FRAME
            yield layout.tokens_file(teacher.name, part.name), Expected(f"tokens of {where}", most)
        for layer, spec in teacher.layers.items():
            rows = self.rows(teacher.name, part, spec) if part.scope == "full" else None
            if rows is not None:
                group = Expected(f"hidden states of {where}", data=group_metadata(), array="a plain group")
                yield layout.group_file(teacher.name, part.name), group
                for name, (shape, dtype) in layout.array_shapes(layer, spec, rows).items():
                    metadata, shard = layout.array_files(teacher.name, part.name, name, shape)
                    what, array = f"layer {layer} of {where}", f"{dtype}{list(shape)}"
                    yield metadata, Expected(what, data=array_metadata(shape, dtype), array=array)
                    if shard:
                        yield shard, Expected(what, size=shard_bytes(shape, np.dtype(dtype).itemsize), array=array)
