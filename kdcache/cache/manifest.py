"""``manifest.json``: what a cache is. Strict, bounded, and able to show that it was edited.

A manifest from somebody else is data: unknown keys, paths of its own, counts beyond bounds and files that do not follow
from the rest are refused before any file of the cache is opened. ``identity`` names the content (everything but
provenance); ``checksum`` covers everything, so that an edit is seen.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic

from kdcache.cache import layout
from kdcache.cache.arrays import array_metadata, group_metadata, shard_bytes
from kdcache.cache.canonical import NotCanonicalError, digest_of, digest_of_ordered, parse_json, readable_json
from kdcache.cache.schema import (
    FORMAT,
    UNKNOWN_FORMAT,
    VERSION,
    ManifestModel,
    contents_document,
    contents_of,
    files_document,
)
from kdcache.cache.spec import needs_tokens
from kdcache.codecs.registry import format_of
from kdcache.errors import DamageError, MismatchError
from kdcache.files import digest_bytes

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.cache.spec import TeacherSpec


MAX_BYTES = 256 << 20
_APART = ("provenance", "identity", "checksum")  # not part of the identity


class Manifest:
    """A checked manifest. ``contents`` is what the identity names; ``provenance`` says how it came about."""

    def __init__(self, document: dict[str, Any], contents: Contents) -> None:
        self._document = {
            key: value for key, value in document.items() if key != "files"
        }  # most of it, and in the contents
        self.contents = contents

    @property
    def identity(self) -> str:
        """sha256 (hex) of the canonical form of everything but provenance."""
        return str(self._document["identity"])

    @property
    def provenance(self) -> dict[str, Any]:
        """Command, versions, times, scores: integers and strings."""
        return dict(self._document["provenance"])

    def to_bytes(self) -> bytes:
        """The file: its canonical order, with line breaks."""
        return readable_json({**self._document, "files": files_document(self.contents.files)})


def make_manifest(contents: Contents, provenance: Mapping[str, Any]) -> Manifest:
    """The manifest of contents; identity and checksum computed. Raises DamageError where contents break the format."""
    document = contents_document(contents)
    document["identity"] = digest_of(document)
    document["provenance"] = plain_provenance(provenance)
    document["checksum"] = digest_of(document)
    return parse_manifest(readable_json(document), "the new manifest")


def read_manifest(root: Path) -> Manifest:
    """Read and check the manifest of a cache directory. Raises DamageError; MismatchError for a newer format."""
    path = root / layout.MANIFEST
    if path.is_symlink() or not path.is_file():
        raise DamageError(
            f"'{root}' has no {layout.MANIFEST}: it is not a cache, or its dump was not finished",
            "Finish the dump by running the same kdcache dump-teachers command again, or name another directory.",
        )
    if path.stat().st_size > MAX_BYTES:
        raise DamageError(f"'{path}' has {path.stat().st_size} bytes; a manifest has at most {MAX_BYTES}")
    try:
        return parse_manifest(path.read_bytes(), f"'{path}'")
    except OSError as error:
        raise DamageError(f"'{path}' cannot be read: {error.strerror}") from error


def parse_manifest(data: bytes, name: str) -> Manifest:
    """Check the bytes of a manifest. Raises DamageError and MismatchError as ``read_manifest``."""
    with _without_collections():
        return _parse(data, name)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection: ten thousand new dicts would start some, and each walks over all that torch has loaded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse(data: bytes, name: str) -> Manifest:
    hint = "Restore it from a copy of the cache, or dump into a new directory."
    try:
        document = parse_json(data)
    except NotCanonicalError as error:
        raise DamageError(f"{name} is damaged: {error}", hint) from error
    if not isinstance(document, dict):
        raise DamageError(f"{name} is damaged: it is not a JSON object", hint)
    version = document.get("version")
    if document.get("format") == FORMAT and isinstance(version, int) and version > VERSION:
        raise MismatchError(
            f"{name} is of cache format {version}; this kdcache reads format {VERSION}",
            "Upgrade it with: pip install -U kdcache",
        )
    _check_digests(document, name, hint)
    try:
        model = ManifestModel.model_validate(document)
        contents = contents_of(model)
        _check_contents(contents)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step)[:80] for step in first["loc"])
        if first["type"] == UNKNOWN_FORMAT:
            raise MismatchError(
                f"{name}: {where}: {first['msg']}", "A newer kdcache may read it: pip install -U kdcache"
            ) from error
        raise DamageError(f"{name} is not a valid manifest: {where}: {first['msg']}", hint) from error
    except ValueError as error:
        raise DamageError(f"{name} is not a valid manifest: {error}", hint) from error
    return Manifest(document, contents)


def plain_provenance(value: Any) -> Any:
    """Provenance in integers and strings: other scalars become the strings that Python prints, null is left out."""
    if isinstance(value, Mapping):
        return {str(key): plain_provenance(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain_provenance(item) for item in value if item is not None]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) < 2**53:
        return value
    return str(value)


def _check_digests(document: dict[str, Any], name: str, hint: str) -> None:
    rest = {key: value for key, value in document.items() if key != "checksum"}
    if digest_of_ordered(rest) != document.get("checksum"):
        raise DamageError(f"{name} was edited or damaged: its checksum does not match", hint)
    named = {key: value for key, value in document.items() if key not in _APART}
    if digest_of_ordered(named) != document.get("identity"):
        raise DamageError(f"{name} was edited: its identity is not that of its content", hint)


def _check_contents(contents: Contents) -> None:
    """What a schema cannot say.

    Names that belong together, files that follow from the rest, sizes that follow from shapes.
    """
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
    for path, most in most_bytes(contents):
        _require(
            contents.files[path].size <= most,
            f"'{path}' is said to have {contents.files[path].size} bytes; it has at most {most}",
        )
    _check_arrays(contents)


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


def _check_arrays(contents: Contents) -> None:
    """Files whose bytes or size follow from shapes alone."""
    group = digest_bytes(group_metadata())
    for name, teacher in contents.teachers.items():
        for part in (part for part in contents.parts if part.scope == "full" and teacher.layers):
            path = layout.group_file(name, part.name)
            _require(contents.files[path] == group, f"'{path}' is not the metadata of a plain group")
            for layer, spec in teacher.layers.items():
                rows = contents.rows(name, part, spec) or 0
                for array, (shape, dtype) in layout.array_shapes(layer, spec, rows).items():
                    _check_array(contents, layout.array_files(name, part.name, array, shape), shape, dtype)


def _check_array(contents: Contents, files: tuple[str, str | None], shape: tuple[int, ...], dtype: str) -> None:
    metadata, shard = files
    _require(
        contents.files[metadata] == digest_bytes(array_metadata(shape, dtype)),
        f"'{metadata}' is not the metadata of {dtype}{list(shape)}",
    )
    itemsize = np.dtype(dtype).itemsize
    if shard:
        expected = shard_bytes(shape, itemsize)
        _require(
            contents.files[shard].size == expected, f"'{shard}' must have {expected} bytes for {dtype}{list(shape)}"
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _first(paths: set[str]) -> str:
    return f"'{min(paths)[:200]}'" if paths else ""


_FRAME = 1 << 16  # schema, header, padding
_EXAMPLE = 1100  # bytes of a row: id, label, and a group of a thousand characters on average
TOKENIZER = 1 << 28
TEXT = 1 << 31  # of a part


def most_bytes(contents: Contents) -> Iterator[tuple[str, int]]:
    """Each file that is read whole, and the bytes that it has at most."""
    for part in contents.parts:
        yield layout.ids_file(part.name), 16 * part.texts + _FRAME
        if contents.has_text:
            yield layout.text_file(part.name), TEXT
    for split in contents.splits.values():
        yield split.file, _EXAMPLE * split.examples + _FRAME
    for teacher in contents.teachers.values():
        yield from _of_teacher(contents, teacher)


def _of_teacher(contents: Contents, teacher: TeacherSpec) -> Iterator[tuple[str, int]]:
    yield layout.tokenizer_file(teacher.name), TOKENIZER
    row = 4 * (teacher.target.shape[0] + (teacher.pooled or 0))
    for part in contents.parts:
        yield layout.outputs_file(teacher.name, part.name), row * part.texts + _FRAME
    texts = {part.name: part.texts for part in contents.parts}
    for part_name, tokens in contents.tokens.get(teacher.name, {}).items():
        yield layout.tokens_file(teacher.name, part_name), 10 * tokens + 4 * texts.get(part_name, 0) + _FRAME
    for layer, spec in teacher.layers.items():
        values = spec.dim * teacher.width + teacher.width + spec.dim
        yield layout.basis_file(teacher.name, layer), 4 * values + _FRAME + format_of(spec).basis_bytes
