"""The contents of a cache: the manifest without provenance, identity and checksum.

A writer starts with the contents of a manifest and of commit records, and adds to them; publishing makes the next
manifest of them. A component (the outputs of a part, one layer of a part) exists if all its files are listed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kdcache.cache import layout

if TYPE_CHECKING:
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

    def expected_files(self) -> dict[str, str]:
        """Every file of these contents -> its component, for messages."""
        expected = {split.file: f"examples of '{name}'" for name, split in self.splits.items()}
        for part in self.parts:
            expected[layout.ids_file(part.name)] = f"text ids of {part.name}"
            if self.has_text:
                expected[layout.text_file(part.name)] = f"text of {part.name}"
        for name, teacher in self.teachers.items():
            expected[layout.tokenizer_file(name)] = f"tokenizer of teacher '{name}'"
            expected |= {
                layout.basis_file(name, layer): f"basis of layer {layer} of teacher '{name}'"
                for layer in teacher.layers
            }
            for part in self.parts:
                expected |= self._part_files(teacher, part)
        return expected

    def _part_files(self, teacher: TeacherSpec, part: PartInfo) -> dict[str, str]:
        where = f"teacher '{teacher.name}', {part.name}"
        files = {layout.outputs_file(teacher.name, part.name): f"outputs of {where}"}
        if part.name in self.tokens.get(teacher.name, {}):
            files[layout.tokens_file(teacher.name, part.name)] = f"tokens of {where}"
        for layer, spec in teacher.layers.items():
            rows = self.rows(teacher.name, part, spec) if part.scope == "full" else None
            if rows is not None:
                files[layout.group_file(teacher.name, part.name)] = f"hidden states of {where}"
                files |= dict.fromkeys(
                    layout.layer_files(teacher.name, part.name, layer, spec, rows), f"layer {layer} of {where}"
                )
        return files
