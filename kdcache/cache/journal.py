"""Commit records under ``.dump/``: the components that a dump has completed and not yet published.

Each record is a small file with the sizes and digests of the files it lists, written after them. After a crash, the
next writer knows from the manifest (if any) and the records exactly what is there. Records belong to the manifest that
was valid when they were made. Once another one is in place, they are obsolete and are removed.

    base.json                     identity of the manifest that this dump starts from, task, settings
    damaged.json                  files that a repair found damaged and that count as missing
    parts/part-00003.json         texts of a new part
    splits/train.json             examples
    teachers/<name>/teacher.json  specification and tokenizer
    teachers/<name>/layer-04.json       basis
    teachers/<name>/part-00003.json     outputs, tokens and layers of one part: grows with what is written
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from kdcache.cache import layout
from kdcache.cache.canonical import NotCanonicalError, canonical_json, digest_of, parse_json
from kdcache.cache.contents import Contents, PartInfo, SplitInfo
from kdcache.cache.schema import (
    BaseRecord,
    FilesRecord,
    PartRecord,
    SplitRecord,
    TeacherPartRecord,
    TeacherRecord,
    fault_of,
    files_document,
    teacher_document,
    teacher_from_document,
)  # fmt: skip
from kdcache.errors import DamageError
from kdcache.files import FileDigest, remove_file, write_file

if TYPE_CHECKING:
    from kdcache.cache.spec import TeacherSpec

_LAYER_NAME = re.compile(r"layer-[0-9]{2,4}")


class Journal:
    """The records of one cache directory. The caller holds its lock."""

    def __init__(self, root: Path) -> None:
        self.directory = root / layout.STATE
        self._part_files: dict[tuple[str, str], dict[str, FileDigest]] = {}

    def begin(self, base: Mapping[str, Any]) -> None:
        """Record what this dump starts from: identity, task, settings, text."""
        self._write("base.json", dict(base))

    def base(self) -> dict[str, Any] | None:
        """What an unfinished dump started from; None if there is none."""
        return self._read_if_there(self.directory / "base.json")

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove all records but those of the teachers ``keep``; ``base.json`` first: without it, all are ignored."""
        remove_file(self.directory / "base.json")
        kept = {self.directory / "teachers" / name for name in keep}
        for path in self._records():
            if path.parent not in kept:
                remove_file(path)

    def apply(self, contents: Contents) -> None:
        """Add the components of all records to ``contents``. Raises DamageError for a damaged record."""
        damaged = self.directory / "damaged.json"
        if damaged.is_file():
            for name, digest in _digests(self._read(damaged)).items():
                contents.files.pop(name, None)
                contents.lost[name] = digest
        for path in self._records():
            if path.parent != self.directory:
                self._apply(contents, path, self._read(path))

    def read_again(self, contents: Contents, teacher: str, name: str | None = None) -> None:
        """Add what other writers recorded of a teacher meanwhile: its part ``name``, or its bases if None."""
        directory = self.directory / "teachers" / teacher
        for path in sorted(directory.glob("layer-*.json")) if name is None else [directory / f"{name}.json"]:
            record = self._read_if_there(path)
            if record is not None:
                self._apply(contents, path, record)

    def recorded_parts(self, teacher: str) -> set[str]:
        """The parts of which a teacher has a commit record, complete or not."""
        return {path.stem for path in (self.directory / "teachers" / teacher).glob("part-*.json")}

    def add_part(self, part: PartInfo, files: Mapping[str, FileDigest]) -> None:
        self._add(f"parts/{part.name}", files, scope=part.scope, texts=part.texts)

    def add_split(self, name: str, split: SplitInfo, files: Mapping[str, FileDigest]) -> None:
        self._add(f"splits/{name}", files, **vars(split))

    def add_teacher(self, spec: TeacherSpec, files: Mapping[str, FileDigest]) -> None:
        self._add(f"teachers/{spec.name}/teacher", files, spec=teacher_document(spec))

    def add_basis(self, teacher: str, layer: int, files: Mapping[str, FileDigest]) -> None:
        self._add(f"teachers/{teacher}/{layout.layer_name(layer)}", files)

    def add_teacher_part(self, teacher: str, part: str, tokens: int | None, files: Mapping[str, FileDigest]) -> None:
        """Record components of a teacher in a part; a later write of more layers extends the record."""
        known = self._part_files.setdefault((teacher, part), {})
        known.update(files)
        self._add(f"teachers/{teacher}/{part}", known, **({} if tokens is None else {"tokens": tokens}))

    def add_damaged(self, lost: Mapping[str, FileDigest]) -> None:
        """Mark files as missing, in the manifest's list and in the records, until they are written again."""
        if not lost:
            return
        for path in self._records():
            record = self._read(path)
            if path.parent != self.directory and lost.keys() & record["files"].keys():
                record["files"] = {name: file for name, file in record["files"].items() if name not in lost}
                self._write(str(path.relative_to(self.directory)), record)
        for files in self._part_files.values():
            for name in lost.keys() & files.keys():
                del files[name]
        place = self.directory / "damaged.json"
        before = _digests(self._read(place)) if place.is_file() else {}
        self._add("damaged", {**before, **lost})

    def _add(self, name: str, files: Mapping[str, FileDigest], **values: Any) -> None:
        self._write(f"{name}.json", {**values, "files": files_document(files)})

    def _apply(self, contents: Contents, path: Path, record: dict[str, Any]) -> None:
        files = _digests(record)
        contents.files.update(files)
        kind, name = path.relative_to(self.directory).parts[0], path.stem
        if kind == "parts":
            if all(known.name != name for known in contents.parts):
                contents.parts.append(PartInfo(name, record["scope"], record["texts"]))
        elif kind == "splits":
            contents.splits[name] = SplitInfo(record["examples"], record["file"])
        elif name == "teacher":
            contents.teachers[path.parent.name] = teacher_from_document(path.parent.name, record["spec"])
        elif name.startswith("part-"):
            self._part_files[path.parent.name, name] = files
            if "tokens" in record:
                contents.tokens.setdefault(path.parent.name, {})[name] = record["tokens"]

    def _records(self) -> list[Path]:
        return sorted(path for path in self.directory.rglob("*.json") if path.name not in ("holder.json", "base.json"))

    def _write(self, name: str, record: dict[str, Any]) -> None:
        write_file(self.directory / name, canonical_json({**record, "checksum": digest_of(record)}))

    def _read_if_there(self, path: Path) -> dict[str, Any] | None:
        try:
            return self._read(path) if path.is_file() else None
        except DamageError:
            if path.exists():
                raise
            return None  # removed after it was found: another writer published

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            record: dict[str, Any] = parse_json(path.read_bytes())
            if record.pop("checksum") != digest_of(record):
                raise ValueError("its checksum does not match")
            self._check(path.relative_to(self.directory).parts, record)
        except pydantic.ValidationError as error:
            raise self._damage(path, fault_of(error)) from error
        except (OSError, NotCanonicalError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damage(path, str(error)[:200]) from error
        return record

    @staticmethod
    def _check(steps: Sequence[str], record: dict[str, Any]) -> None:
        """Check name and shape of a record, which may come from somebody else. Raises ValueError."""
        name = steps[-1].removesuffix(".json")
        match steps:
            case ["base.json"]:
                BaseRecord.model_validate(record)
            case ["damaged.json"]:
                FilesRecord.model_validate(record)
            case ["parts", _] if layout.PART_NAME.fullmatch(name):
                PartRecord.model_validate(record)
            case ["splits", _] if layout.SPLIT_NAME.fullmatch(name):
                SplitRecord.model_validate(record)
            case ["teachers", teacher, "teacher.json"] if layout.TEACHER_NAME.fullmatch(teacher):
                TeacherRecord.model_validate(record)
                teacher_from_document(teacher, record["spec"])
            case ["teachers", teacher, _] if layout.TEACHER_NAME.fullmatch(teacher) and _LAYER_NAME.fullmatch(name):
                FilesRecord.model_validate(record)
            case ["teachers", teacher, _] if layout.TEACHER_NAME.fullmatch(teacher) and layout.PART_NAME.fullmatch(
                name
            ):
                TeacherPartRecord.model_validate(record)
            case _:
                raise ValueError("no record has such a name")

    def _damage(self, path: Path, reason: str) -> DamageError:
        return DamageError(
            f"commit record '{path}' is damaged: {reason}",
            f"Remove '{self.directory}' and run the command again: what is not in the manifest is dumped again.",
        )


def _digests(record: dict[str, Any]) -> dict[str, FileDigest]:
    return {path: FileDigest(file["bytes"], file["sha256"]) for path, file in record["files"].items()}
