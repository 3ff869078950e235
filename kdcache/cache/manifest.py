"""``manifest.json``: the content of a cache. It is parsed strictly and within bounds, and edits are detected.

A manifest may come from somebody else. Unknown keys, other paths, counts beyond bounds, and files that do not follow
from the rest are refused before any file of the cache is opened. ``identity`` is the digest of the content, which is
everything except provenance. ``checksum`` covers everything.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from kdcache.cache import layout
from kdcache.cache.canonical import digest_of, digest_of_ordered, readable_json
from kdcache.cache.schema import (
    FORMAT,
    UNKNOWN_FORMAT,
    ManifestModel,
    checked_document,
    contents_document,
    contents_of,
    fault_of,
    files_document,
)
from kdcache.cache.spec import needs_tokens
from kdcache.codecs.registry import format_of
from kdcache.errors import DamageError, MismatchError
from kdcache.files import digest_bytes

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents, Expected
    from kdcache.cache.spec import TeacherSpec
    from kdcache.files import FileDigest


MAX_BYTES = 256 << 20
_OUTSIDE = ("provenance", "identity", "checksum")  # keys that the identity does not cover


class Manifest:
    """A checked manifest. The identity covers ``contents``; ``provenance`` records how the cache was made."""

    def __init__(self, document: dict[str, Any], contents: Contents) -> None:
        # without the files: they need most of the memory, and are in the contents
        self._document = {key: value for key, value in document.items() if key != "files"}
        self.contents = contents

    @property
    def identity(self) -> str:
        """sha256 (hex) of the canonical form of everything except provenance."""
        return str(self._document["identity"])

    @property
    def provenance(self) -> dict[str, Any]:
        """Command, versions, times, scores: integers and strings."""
        return dict(self._document["provenance"])

    def to_bytes(self) -> bytes:
        """The bytes of the file: keys in canonical order, with line breaks."""
        return readable_json({**self._document, "files": files_document(self.contents.files)})


def make_manifest(contents: Contents, provenance: Mapping[str, Any]) -> Manifest:
    """The manifest of ``contents``, with identity and checksum. Raises DamageError if they violate the format."""
    document = contents_document(contents)
    document["identity"] = digest_of(document)
    document["provenance"] = plain_provenance(provenance)
    document["checksum"] = digest_of(document)
    return parse_manifest(readable_json(document), "the new manifest")


def read_manifest(root: Path) -> Manifest:
    """Read and check the manifest of a cache directory. Raises DamageError; MismatchError for a newer format."""
    path = root / layout.MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise DamageError(
                f"'{root}' has no {layout.MANIFEST}: it is not a cache, or its dump was not finished",
                "Finish the dump by running the same kdcache dump-teachers command again, or name another directory.",
            )
        if path.stat().st_size > MAX_BYTES:
            raise DamageError(f"'{path}' has {path.stat().st_size} bytes; a manifest has at most {MAX_BYTES}")
        return parse_manifest(path.read_bytes(), f"'{path}'")
    except OSError as error:
        raise DamageError(f"'{path}' cannot be read: {error.strerror}") from error


def parse_manifest(data: bytes, name: str) -> Manifest:
    """Check the bytes of a manifest. Raises DamageError and MismatchError as ``read_manifest``."""
    with _no_garbage_collection():
        return _parse(data, name)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Ten thousand new dicts would start collections, and each one visits every object that torch has loaded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse(data: bytes, name: str) -> Manifest:
    hint = "Restore it from a copy of the cache, or dump into a new directory."
    document = checked_document(data, name, FORMAT, "of cache format", hint)
    content = {key: value for key, value in document.items() if key not in _OUTSIDE}
    if digest_of_ordered(content) != document.get("identity"):
        raise DamageError(f"{name} was edited: its identity is not that of its content", hint)
    try:
        model = ManifestModel.model_validate(document)
        contents = contents_of(model)
        _check_contents(contents)
    except pydantic.ValidationError as error:
        if error.errors()[0]["type"] == UNKNOWN_FORMAT:
            raise MismatchError(
                f"{name}: {fault_of(error)}", "A newer kdcache may read it: pip install -U kdcache"
            ) from error
        raise DamageError(f"{name} is not a valid manifest: {fault_of(error)}", hint) from error
    except ValueError as error:
        raise DamageError(f"{name} is not a valid manifest: {error}", hint) from error
    return Manifest(document, contents)


def plain_provenance(value: Any) -> Any:
    """Provenance as integers and strings: other scalars become the strings that Python prints, None is left out."""
    if isinstance(value, Mapping):
        return {str(key): plain_provenance(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain_provenance(item) for item in value if item is not None]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) < 2**53:
        return value
    return str(value)


def _check_contents(contents: Contents) -> None:
    """Check what a schema cannot express: consistent names, the list of files, and sizes that follow from shapes."""
    for index, part in enumerate(contents.parts):
        _require(part.name == layout.part_name(index), f"part {index} is called '{part.name}'")
        _require(part.texts <= contents.settings.part_size, f"{part.name} has more texts than part_size")
    for what, names in (("text columns", contents.task.text_columns), ("label names", contents.task.label_names)):
        _require(len(set(names)) == len(names), f"{what} are not distinct")
    _require(
        len({name.casefold() for name in contents.teachers}) == len(contents.teachers),
        "two teachers differ in case only",
    )
    for name, split in contents.splits.items():
        digest = contents.files.get(split.file)
        _require(
            digest is not None and split.file == layout.examples_file(name, digest.sha256),
            f"split '{name}' names '{split.file}'",
        )
    full = {part.name for part in contents.parts if part.scope == "full"}
    for name, teacher in contents.teachers.items():
        _check_teacher(teacher, set(contents.tokens[name]), full, len(contents.task.label_names))
        for part in contents.parts:
            tokens, most = contents.tokens[name].get(part.name, 0), part.texts * teacher.max_length
            _require(
                tokens <= most, f"teacher '{name}' has {tokens} tokens in {part.name}, whose texts have at most {most}"
            )
    expected = contents.expected_files()
    _require(
        contents.files.keys() <= expected.keys(),
        f"files lists {_first(contents.files.keys() - expected.keys())}, which belongs to nothing",
    )
    _require(expected.keys() <= contents.files.keys(), f"files lacks {_first(expected.keys() - contents.files.keys())}")
    for path, file in expected.items():
        _check_file(path, contents.files[path], file)


_digest_of_bytes = functools.lru_cache(maxsize=4096)(digest_bytes)  # layers of parts have equal metadata


def _check_file(path: str, listed: FileDigest, file: Expected) -> None:
    if file.data is not None:
        _require(listed == _digest_of_bytes(file.data), f"'{path}' is not the metadata of {file.array}")
    elif file.size is not None:
        _require(listed.size == file.size, f"'{path}' must have {file.size} bytes for {file.array}")
    else:
        _require(listed.size <= file.most, f"'{path}' is listed with {listed.size} bytes; it has at most {file.most}")


def _check_teacher(teacher: TeacherSpec, with_tokens: set[str], full: set[str], classes: int) -> None:
    where = f"teacher '{teacher.name}'"
    _require(
        teacher.target.shape == (classes,),
        f"{where} has a target of shape {list(teacher.target.shape)} for {classes} labels",
    )
    _require(with_tokens <= full, f"{where} has tokens of a part that has none")
    _require(not needs_tokens(teacher.layers) or with_tokens == full, f"{where} lacks tokens of a part")
    for layer, spec in teacher.layers.items():
        _require(layer <= teacher.depth, f"{where} has a layer {layer} beyond its depth {teacher.depth}")
        try:
            format_of(spec).check_layer(spec, teacher.width)
        except ValueError as error:
            raise ValueError(f"{where}: layer {layer} {error}") from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _first(paths: set[str]) -> str:
    return f"'{min(paths)[:200]}'" if paths else ""
