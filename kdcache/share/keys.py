"""The keys of objects on a remote. They follow from digests, names and numbers (docs/decisions/0010).

A key that does not parse here is not kdcache's: such an object is neither read nor deleted.
"""

from __future__ import annotations

import re

from kdcache.errors import RecipeError

FILES = "files/"
MANIFESTS = "manifests/"
REFS = "refs/"
INTENTS = "intents/"
MARKS = "marks/"

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PREFIX = re.compile(r"[0-9a-f]{6,64}")  # of a digest, in a reference
MAX_NUMBER = 999_999_999

_FILE = re.compile(r"files/([0-9a-f]{2})/([0-9a-f]{64})")
_MANIFEST = re.compile(r"manifests/([0-9a-f]{64})\.json")
_REF = re.compile(r"refs/([a-z0-9][a-z0-9._-]{0,63})/([1-9][0-9]{0,8})(?:-([0-9a-f]{16}))?\.json")
_LEASE = re.compile(r"(?:intents|marks)/([0-9a-f]{32})\.json")


def file_key(sha256: str) -> str:
    """A data file, by the sha256 of its bytes."""
    return f"{FILES}{sha256[:2]}/{sha256}"


def manifest_key(sha256: str) -> str:
    """A manifest, by the sha256 of its bytes (not by the identity of the cache)."""
    return f"{MANIFESTS}{sha256}.json"


def ref_key(name: str, number: int, token: str | None = None) -> str:
    """A version of a name; with ``token`` (16 hex digits) on a store without conditional creates."""
    return f"{refs_of(name)}{number}{f'-{token}' if token else ''}.json"


def refs_of(name: str) -> str:
    """The prefix of all versions of a name."""
    return f"{REFS}{name}/"


def intent_key(token: str) -> str:
    """The lease of a push."""
    return f"{INTENTS}{token}.json"


def mark_key(token: str) -> str:
    """The lease of a gc."""
    return f"{MARKS}{token}.json"


def parse_file_key(key: str) -> str | None:
    """The sha256 in the key of a data file; None for any other key."""
    match = _FILE.fullmatch(key)
    return match[2] if match and match[2].startswith(match[1]) else None


def parse_manifest_key(key: str) -> str | None:
    """The sha256 in the key of a manifest; None for any other key."""
    match = _MANIFEST.fullmatch(key)
    return match[1] if match else None


def parse_ref_key(key: str) -> tuple[str, int, str | None] | None:
    """Name, number and token in the key of a version; None for any other key."""
    match = _REF.fullmatch(key)
    return (match[1], int(match[2]), match[3]) if match else None


def is_lease_key(key: str) -> bool:
    """Whether this is the key of an intent or a mark."""
    return _LEASE.fullmatch(key) is not None


def check_name(name: str) -> str:
    """Returns ``name``. Raises RecipeError if it is not a valid name of a cache."""
    if not NAME.fullmatch(name):
        raise RecipeError(
            f"'{name[:80]}' is not a name for a cache: 1 to 64 of a-z, 0-9, '.', '_', '-', the first a letter or digit",
            "Such as: --name sst2-3t",
        )
    return name


def check_tag(tag: str) -> str:
    """Returns ``tag``. Raises RecipeError if it looks like a number or a digest, or has other characters."""
    if not TAG.fullmatch(tag) or tag.isdecimal() or PREFIX.fullmatch(tag):
        raise RecipeError(
            f"'{tag[:80]}' is not a tag: 1 to 64 of a-z, A-Z, 0-9, '.', '_', '-', and neither a number nor six or more "
            "hex digits",
            "Such as: --tag v2",
        )
    return tag


def split_reference(reference: str) -> tuple[str, str | None]:
    """The name, and the version after ``@`` or None. Raises RecipeError if it is not a reference."""
    name, at, version = reference.partition("@")
    if at and not TAG.fullmatch(version):
        raise RecipeError(f"'{reference[:120]}' names no version", "Write NAME, NAME@3, NAME@TAG or NAME@DIGEST.")
    return check_name(name), version if at else None
