"""The schema of a manifest: strict pydantic models with a bound on every count, converted to and from ``Contents``.

Documents that kdcache reads (manifests, commit records, selections, refs) may come from somebody else. They share the
checks of this module: ``checked_document`` and ``fault_of``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from kdcache.cache import layout
from kdcache.cache.canonical import NotCanonicalError, digest_of_ordered, parse_json
from kdcache.cache.contents import Contents, PartInfo, SplitInfo
from kdcache.cache.spec import Fingerprints, FoldsSpec, Settings, TargetSpec, TaskSpec, TeacherSpec
from kdcache.codecs.base import LayerSpec
from kdcache.codecs.registry import storage_format
from kdcache.errors import DamageError, MismatchError
from kdcache.files import FileDigest

FORMAT = "kdcache"
VERSION = 1
UNKNOWN_FORMAT = "unknown_storage_format"  # the ``type`` of this error in pydantic

MAX_PARTS, MAX_FILES = 100_000, 1_000_000  # of a cache

Count = Annotated[int, Field(ge=0, le=2**40)]
Size = Annotated[int, Field(ge=1, le=2**20)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+:/ -]{0,127}$")]
Label = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]  # they are printed
Digits = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,3})$")]
PartName = Annotated[str, Field(pattern=f"^{layout.PART_NAME.pattern}$")]
TeacherName = Annotated[str, Field(pattern=f"^{layout.TEACHER_NAME.pattern}$")]
SplitName = Annotated[str, Field(pattern=f"^{layout.SPLIT_NAME.pattern}$")]
Path_ = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,7}$", max_length=240)]


def _known_format(name: str) -> str:
    try:
        return storage_format(name).name
    except MismatchError as error:
        raise PydanticCustomError(UNKNOWN_FORMAT, "{reason}", {"reason": error.message}) from error


def checked_document(data: bytes, name: str, form: str, title: str, hint: str) -> dict[str, Any]:
    """Parse the bytes of a document whose ``format`` is ``form``, and compare its checksum.

    ``name`` and ``title`` ("a ref of format") are for messages. Raises DamageError with ``hint``; MismatchError for a
    newer version of the format.
    """
    try:
        document = parse_json(data)
    except NotCanonicalError as error:
        raise DamageError(f"{name} is damaged: {str(error)[:200]}", hint) from error
    if not isinstance(document, dict):
        raise DamageError(f"{name} is damaged: it is not a JSON object", hint)
    version = document.get("version")
    if document.get("format") == form and isinstance(version, int) and version > VERSION:
        raise MismatchError(
            f"{name} is {title} {version}; this kdcache reads format {VERSION}",
            "Upgrade it with: pip install -U kdcache",
        )
    rest = {key: value for key, value in document.items() if key != "checksum"}
    if digest_of_ordered(rest) != document.get("checksum"):
        raise DamageError(f"{name} was edited or damaged: its checksum does not match", hint)
    return document


def fault_of(error: ValidationError) -> str:
    """The first fault that pydantic found: the path of keys that leads to it, and what is wrong."""
    first = error.errors()[0]
    return f"{'.'.join(str(step)[:80] for step in first['loc'])}: {first['msg']}"


class Strict(BaseModel):
    """A model that takes exactly its keys, in exactly their types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TaskModel(Strict):
    text_columns: Annotated[list[Label], Field(min_length=1, max_length=8)]
    label_names: Annotated[list[Label], Field(min_length=1, max_length=65536)]


class SettingsModel(Strict):
    seed: Annotated[int, Field(ge=-(2**53) + 1, le=2**53 - 1)]
    part_size: Size


class PartModel(Strict):
    name: PartName
    scope: Literal["full", "logits"]
    texts: Size


class SplitModel(Strict):
    examples: Count
    file: Path_


class FingerprintsModel(Strict):
    weights: Hex
    config: Hex
    head: Hex
    tokenizer: Hex


class LayerModel(Strict):
    projection: Literal["none", "pca", "random"]
    dim: Annotated[int, Field(ge=1, le=65536)]
    dtype: Annotated[Word, AfterValidator(_known_format)]
    bytes: Annotated[int, Field(ge=1, le=65536)] | None = None  # of a row, if the format is ``by_bytes``
    tokens: Literal["first", "pooled"] | None = None  # absent: all tokens


class TargetModel(Strict):
    kind: Literal["class-logits"]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=65536)]], Field(min_length=1, max_length=1)]
    dtype: Literal["float32"]


class FoldsModel(Strict):
    weights: Annotated[list[Hex], Field(min_length=2, max_length=100)]
    logits: Hex
    texts: Annotated[Count, Field(ge=1)]


class TeacherModel(Strict):
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
    folds: FoldsModel | None = None  # absent: all logits are those of the teacher
    tokens: Annotated[dict[PartName, Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=100_000)]


class FileModel(Strict):
    bytes: Count
    sha256: Hex


class ManifestModel(Strict):
    format: Literal["kdcache"]
    version: Literal[1]
    task: TaskModel
    settings: SettingsModel
    text: Literal["stored", "absent"]
    parts: Annotated[list[PartModel], Field(max_length=MAX_PARTS)]
    splits: Annotated[dict[SplitName, SplitModel], Field(max_length=64)]
    teachers: Annotated[dict[TeacherName, TeacherModel], Field(max_length=1000)]
    files: Annotated[dict[Path_, FileModel], Field(max_length=MAX_FILES)]
    provenance: dict[str, Any]
    identity: Hex
    checksum: Hex


class FilesRecord(Strict):
    """A commit record with files: of a basis or of a repair. Other records have more keys."""

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
    """What a dump starts from; ``identity`` is empty if there was no cache."""

    identity: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    text: Literal["stored", "absent"]


def contents_document(contents: Contents) -> dict[str, Any]:
    """The part of a manifest that its identity is computed from, as plain JSON values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": asdict(contents.task),
        "settings": asdict(contents.settings),
        "text": "stored" if contents.has_text else "absent",
        "parts": [vars(part) for part in contents.parts],
        "splits": {name: vars(split) for name, split in contents.splits.items()},
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
    values = {key: value for key, value in vars(spec).items() if key not in ("name", "folds")}
    folds = {} if spec.folds is None else {"folds": asdict(spec.folds)}
    return (
        values
        | folds
        | {
            "fingerprints": asdict(spec.fingerprints),
            "target": asdict(spec.target),
            "pooled": spec.pooled or 0,
            "layers": {str(layer): _layer_document(layer_spec) for layer, layer_spec in spec.layers.items()},
        }
    )


def _layer_document(spec: LayerSpec) -> dict[str, Any]:
    optional = ({"bytes": spec.bytes} if spec.bytes else {}) | ({"tokens": spec.tokens} if spec.per_text else {})
    return {"projection": spec.projection, "dim": spec.dim, "dtype": spec.dtype, **optional}


def teacher_from_document(name: str, document: dict[str, Any]) -> TeacherSpec:
    """The inverse of ``teacher_document``. Raises pydantic's ValidationError, a ValueError, if it is not valid."""
    return _teacher(name, TeacherModel.model_validate({"tokens": {}, **document}))


def _teacher(name: str, model: TeacherModel) -> TeacherSpec:
    values = {key: value for key, value in model if key != "tokens"}
    layers = {int(number): layer for number, layer in model.layers.items()}
    values |= {
        "fingerprints": Fingerprints(**dict(model.fingerprints)),
        "target": TargetSpec(model.target.kind, tuple(model.target.shape), model.target.dtype),
        "pooled": model.pooled or None,
        "layers": {
            number: LayerSpec(layer.projection, layer.dim, layer.dtype, layer.bytes or 0, layer.tokens or "all")
            for number, layer in sorted(layers.items())
        },
        "folds": model.folds and FoldsSpec(tuple(model.folds.weights), model.folds.logits, model.folds.texts),
    }
    return TeacherSpec(name, **values)


def contents_of(model: ManifestModel) -> Contents:
    """The contents that a valid manifest describes."""
    return Contents(
        task=TaskSpec(tuple(model.task.text_columns), tuple(model.task.label_names)),
        settings=Settings(**dict(model.settings)),
        has_text=model.text == "stored",
        parts=[PartInfo(**dict(part)) for part in model.parts],
        splits={name: SplitInfo(**dict(split)) for name, split in model.splits.items()},
        teachers={name: _teacher(name, teacher) for name, teacher in model.teachers.items()},
        tokens={name: dict(teacher.tokens) for name, teacher in model.teachers.items()},
        files={path: FileDigest(file.bytes, file.sha256) for path, file in model.files.items()},
    )
