"""The shape of a manifest: strict pydantic models with a bound on every count, and the way to and from ``Contents``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from kdcache.cache.contents import Contents, PartInfo, SplitInfo
from kdcache.cache.spec import Fingerprints, Settings, TargetSpec, TaskSpec, TeacherSpec
from kdcache.codecs.base import LayerSpec
from kdcache.codecs.registry import storage_format
from kdcache.errors import MismatchError
from kdcache.files import FileDigest

FORMAT = "kdcache"
VERSION = 1
UNKNOWN_FORMAT = "unknown_storage_format"  # pydantic's kind of that error

Count = Annotated[int, Field(ge=0, le=2**40)]
Size = Annotated[int, Field(ge=1, le=2**20)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+:/ -]{0,127}$")]
Label = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]  # they are printed
Digits = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,3})$")]
PART_NAME = re.compile(r"^part-[0-9]{5}$")
TEACHER_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
SPLIT_NAME = re.compile(r"^[a-z][a-z0-9_-]{0,31}$")
PartName = Annotated[str, Field(pattern=PART_NAME.pattern)]
TeacherName = Annotated[str, Field(pattern=TEACHER_NAME.pattern)]
SplitName = Annotated[str, Field(pattern=SPLIT_NAME.pattern)]
Path_ = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,7}$", max_length=240)]


def _known_format(name: str) -> str:
    try:
        return storage_format(name).name
    except MismatchError as error:
        raise PydanticCustomError(UNKNOWN_FORMAT, "{reason}", {"reason": error.message}) from error


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TaskModel(_Strict):
    text_columns: Annotated[list[Label], Field(min_length=1, max_length=8)]
    label_names: Annotated[list[Label], Field(min_length=1, max_length=65536)]


class SettingsModel(_Strict):
    seed: Annotated[int, Field(ge=-(2**53) + 1, le=2**53 - 1)]
    part_size: Size


class PartModel(_Strict):
    name: PartName
    scope: Literal["full", "logits"]
    texts: Size


class SplitModel(_Strict):
    examples: Count
    file: Path_


class FingerprintsModel(_Strict):
    weights: Hex
    config: Hex
    head: Hex
    tokenizer: Hex


class LayerModel(_Strict):
    projection: Literal["none", "pca", "random"]
    dim: Annotated[int, Field(ge=1, le=65536)]
    dtype: Annotated[Word, AfterValidator(_known_format)]
    bytes: Annotated[int, Field(ge=1, le=65536)] | None = None  # of a row, where the format wants it set
    tokens: Literal["first", "pooled"] | None = None  # absent: every token


class TargetModel(_Strict):
    kind: Literal["class-logits"]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=65536)]], Field(min_length=1, max_length=1)]
    dtype: Literal["float32"]


class TeacherModel(_Strict):
    head: Literal["shared", "own"]
    fingerprints: FingerprintsModel
    depth: Annotated[int, Field(ge=0, le=9999)]
    width: Annotated[int, Field(ge=1, le=65536)]
    max_length: Size
    truncation: Word
    backend: Word
    precision: Word
    target: TargetModel
    pooled: Annotated[int, Field(ge=0, le=65536)]  # 0: no pooled vector
    sample_texts: Count
    layers: Annotated[dict[Digits, LayerModel], Field(max_length=1000)]
    tokens: Annotated[dict[PartName, Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=100_000)]


class FileModel(_Strict):
    bytes: Count
    sha256: Hex


class ManifestModel(_Strict):
    format: Literal["kdcache"]
    version: Literal[1]
    task: TaskModel
    settings: SettingsModel
    text: Literal["stored", "absent"]
    parts: Annotated[list[PartModel], Field(max_length=100_000)]
    splits: Annotated[dict[SplitName, SplitModel], Field(max_length=64)]
    teachers: Annotated[dict[TeacherName, TeacherModel], Field(max_length=1000)]
    files: Annotated[dict[Path_, FileModel], Field(max_length=1_000_000)]
    provenance: dict[str, Any]
    identity: Hex
    checksum: Hex


class FilesRecord(_Strict):
    """A commit record that names files: of a basis, of a repair; the other records add to it."""

    files: Annotated[dict[Path_, FileModel], Field(max_length=1_000_000)]


class PartRecord(FilesRecord):
    scope: Literal["full", "logits"]
    texts: Size


class SplitRecord(SplitModel, FilesRecord):
    pass


class TeacherRecord(FilesRecord):
    spec: dict[str, Any]  # checked by ``teacher_from_document``


class TeacherPartRecord(FilesRecord):
    tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None


class BaseRecord(SettingsModel, TaskModel):
    """What a dump starts from; ``identity`` is empty where there was no cache."""

    identity: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    text: Literal["stored", "absent"]


def contents_document(contents: Contents) -> dict[str, Any]:
    """The part of a manifest that its identity is computed from, as plain JSON values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": {"text_columns": list(contents.task.text_columns), "label_names": list(contents.task.label_names)},
        "settings": {"seed": contents.settings.seed, "part_size": contents.settings.part_size},
        "text": "stored" if contents.has_text else "absent",
        "parts": [{"name": part.name, "scope": part.scope, "texts": part.texts} for part in contents.parts],
        "splits": {name: {"examples": split.examples, "file": split.file} for name, split in contents.splits.items()},
        "teachers": {
            name: {**teacher_document(spec), "tokens": dict(contents.tokens.get(name, {}))}
            for name, spec in contents.teachers.items()
        },
        "files": files_document(contents.files),
    }


def files_document(files: Mapping[str, FileDigest]) -> dict[str, dict[str, int | str]]:
    """Files with size and sha256 as JSON values."""
    return {path: {"bytes": digest.size, "sha256": digest.sha256} for path, digest in files.items()}


def teacher_document(spec: TeacherSpec) -> dict[str, Any]:
    """A teacher's specification as JSON values; the name is its key."""
    prints = spec.fingerprints
    return {
        "head": spec.head,
        "fingerprints": {
            "weights": prints.weights,
            "config": prints.config,
            "head": prints.head,
            "tokenizer": prints.tokenizer,
        },
        "depth": spec.depth,
        "width": spec.width,
        "max_length": spec.max_length,
        "truncation": spec.truncation,
        "backend": spec.backend,
        "precision": spec.precision,
        "target": {"kind": spec.target.kind, "shape": list(spec.target.shape), "dtype": spec.target.dtype},
        "pooled": spec.pooled or 0,
        "sample_texts": spec.sample_texts,
        "layers": {str(layer): _layer_document(one) for layer, one in spec.layers.items()},
    }


def _layer_document(spec: LayerSpec) -> dict[str, Any]:
    rare = ({"bytes": spec.bytes} if spec.bytes else {}) | ({"tokens": spec.tokens} if spec.per_text else {})
    return {"projection": spec.projection, "dim": spec.dim, "dtype": spec.dtype, **rare}


def teacher_from_document(name: str, document: dict[str, Any]) -> TeacherSpec:
    """The inverse of ``teacher_document``. Raises ValueError (pydantic's) where it is not one."""
    return _teacher(name, TeacherModel.model_validate({"tokens": {}, **document}))


def _teacher(name: str, model: TeacherModel) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        head=model.head,
        fingerprints=Fingerprints(**model.fingerprints.model_dump()),
        depth=model.depth,
        width=model.width,
        max_length=model.max_length,
        truncation=model.truncation,
        backend=model.backend,
        precision=model.precision,
        target=TargetSpec(model.target.kind, tuple(model.target.shape), model.target.dtype),
        pooled=model.pooled or None,
        sample_texts=model.sample_texts,
        layers={
            int(layer): LayerSpec(one.projection, one.dim, one.dtype, one.bytes or 0, one.tokens or "all")
            for layer, one in sorted(model.layers.items(), key=_number)
        },
    )


def _number(item: tuple[str, LayerModel]) -> int:
    return int(item[0])


def contents_of(model: ManifestModel) -> Contents:
    """The contents that a valid manifest describes."""
    return Contents(
        task=TaskSpec(tuple(model.task.text_columns), tuple(model.task.label_names)),
        settings=Settings(model.settings.seed, model.settings.part_size),
        has_text=model.text == "stored",
        parts=[PartInfo(part.name, part.scope, part.texts) for part in model.parts],
        splits={name: SplitInfo(split.examples, split.file) for name, split in model.splits.items()},
        teachers={name: _teacher(name, teacher) for name, teacher in model.teachers.items()},
        tokens={name: dict(teacher.tokens) for name, teacher in model.teachers.items()},
        files={path: FileDigest(file.bytes, file.sha256) for path, file in model.files.items()},
    )
