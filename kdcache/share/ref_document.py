"""The document of a ref: one version of a name, or a tombstone that removes versions.

It may come from somebody else, so it is parsed strictly and within bounds. It is canonical JSON with a checksum, so a
flipped bit is detected and never read as another version. It repeats name and number, so a copy under another key is
detected too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from kdcache.cache.canonical import canonical_json, digest_of
from kdcache.cache.schema import VERSION, Hex, Strict, checked_document, fault_of
from kdcache.errors import DamageError
from kdcache.share import keys as layout

MAX_BYTES = 1 << 16
MAX_REMOVED = 5000  # versions that one tombstone can name
FORMAT = "kdcache-ref"
_HINT = "Restore that object from a backup of the remote, or delete it."

Number = Annotated[int, Field(ge=1, le=layout.MAX_NUMBER)]
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]


@dataclass(frozen=True)
class Ref:
    """A version of a name, or a tombstone: then ``removes`` names earlier versions, and the digests are empty."""

    name: str
    number: int
    manifest: str  # sha256 of the manifest's bytes
    identity: str
    tag: str | None
    removes: tuple[int, ...] | Literal["all"] | None
    made: str  # UTC, such as 2026-11-20T08:30:00Z, on the store's clock
    key: str
    size: int = 0  # bytes of all files of the cache
    files: int = 0

    def drops(self, other: Ref) -> bool:
        """Whether this tombstone removes ``other``."""
        if self.removes is None or other.number >= self.number or other.name != self.name:
            return False
        return self.removes == "all" or other.number in self.removes

    @property
    def pinned(self) -> str:
        """The reference ``name@number``."""
        return f"{self.name}@{self.number}"


class _Ref(Strict):
    format: Literal["kdcache-ref"]
    version: Literal[1]
    name: Annotated[str, Field(pattern=rf"^{layout.NAME.pattern}$")]
    number: Number
    made: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
    token: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    checksum: Hex


class _Version(_Ref):
    manifest: Hex
    identity: Hex
    tag: Annotated[str, Field(pattern=rf"^{layout.TAG.pattern}$")] = ""
    bytes: Count
    files: Count


class _Tombstone(_Ref):
    removes: Literal["all"] | Annotated[list[Number], Field(min_length=1, max_length=MAX_REMOVED)]


def ref_bytes(ref: Ref, token: str) -> bytes:
    """The bytes of a ref; ``token`` (16 random hex digits) makes those of two writers differ."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "name": ref.name,
        "number": ref.number,
        "made": ref.made,
        "token": token,
    }
    if ref.removes is None:
        document |= {"manifest": ref.manifest, "identity": ref.identity, "bytes": ref.size, "files": ref.files}
        document |= {"tag": ref.tag} if ref.tag else {}
    else:
        document |= {"removes": ref.removes}
    return canonical_json({**document, "checksum": digest_of(document)})


def parse_ref(data: bytes, key: str) -> Ref:
    """Check and read the object ``key``. Raises DamageError; MismatchError if a newer kdcache wrote it."""
    document = checked_document(data, f"'{key}'", FORMAT, "a ref of format", _HINT)
    kind = _Tombstone if "removes" in document else _Version
    try:
        model = kind.model_validate(document)
    except ValidationError as error:
        raise DamageError(f"'{key}' is not a valid ref: {fault_of(error)}", _HINT) from error
    place = layout.parse_ref_key(key)
    if place is None or place[:2] != (model.name, model.number):
        raise DamageError(f"'{key}' holds version {model.number} of '{model.name}'", _HINT)
    if isinstance(model, _Tombstone):
        removes: Any = "all" if model.removes == "all" else tuple(model.removes)
        return Ref(model.name, model.number, "", "", None, removes, model.made, key)
    return Ref(
        model.name, model.number, model.manifest, model.identity, model.tag or None, None, model.made, key,
        model.bytes, model.files,
    )  # fmt: skip
