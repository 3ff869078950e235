"""Canonical JSON (RFC 8785) of integers and strings, and a JSON reader that accepts nothing else.

An identity is a digest of a document, so every program must write the same bytes for the same document. Fractions are
the only difficult part of RFC 8785, and manifests have none: a score is a string. The remaining rules are easy in any
language: keys sorted by UTF-16 code units, no white space, the shortest string escapes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

MAX_INTEGER = 2**53 - 1  # the largest integer that every JSON reader keeps exactly
MAX_DEPTH = 16


class NotCanonicalError(ValueError):
    """The value or the text has no canonical form."""


def canonical_json(value: Any) -> bytes:
    """The RFC 8785 form, as UTF-8.

    Raises NotCanonicalError for fractions, null, booleans, half surrogates and large integers.
    """
    text = json.dumps(ordered(value), ensure_ascii=False, separators=(",", ":"))
    return _encode(text)


def readable_json(value: Any) -> bytes:
    """The same document with line breaks, for people; its canonical form is that of ``value``."""
    return _encode(json.dumps(ordered(value), ensure_ascii=False, indent=1) + "\n")


def digest_of(value: Any) -> str:
    """sha256 (hex) of the canonical form."""
    return digest_of_ordered(ordered(value))


def digest_of_ordered(value: Any) -> str:
    """``digest_of`` a result of ``ordered`` or ``parse_json``, without sorting again.

    Sorting is most of the work: a manifest lists ten thousand files.
    """
    return hashlib.sha256(_encode(json.dumps(value, ensure_ascii=False, separators=(",", ":")))).hexdigest()


def ordered(value: Any, depth: int = 0) -> Any:
    """``value`` with the keys of all objects in canonical order. Raises NotCanonicalError."""
    if depth > MAX_DEPTH:
        raise NotCanonicalError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return _unicode(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > MAX_INTEGER:
            raise NotCanonicalError(f"integer {value} is beyond 2^53 - 1")
        return value
    if isinstance(value, dict | Mapping):  # the check for dict is much faster than that for Mapping
        if not all(isinstance(key, str) for key in value):
            raise NotCanonicalError("keys must be strings")
        return {key: ordered(value[key], depth + 1) for key in _in_order(value)}
    if isinstance(value, list | tuple):
        return [ordered(item, depth + 1) for item in value]
    raise NotCanonicalError(f"{type(value).__name__} {value!r}: only objects, lists, strings and integers")


def parse_json(data: bytes) -> Any:
    """Parse JSON of objects, lists, strings and integers.

    Raises NotCanonicalError for any other value, and for duplicate keys.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
            parse_int=_small_integer,
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise NotCanonicalError(str(error)) from error
    return ordered(value)


def _in_order(keys: Iterable[str]) -> list[str]:
    """Keys sorted by UTF-16 code units; for ASCII that is Python's own order."""
    if all(map(str.isascii, keys)):
        return sorted(keys)
    return sorted(map(_unicode, keys), key=lambda key: key.encode("utf-16-be"))


def _unicode(text: str) -> str:
    """``text``. Raises NotCanonicalError for half of a surrogate pair, which has no UTF-8 form."""
    if not text.isascii():
        _encode(text)
    return text


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotCanonicalError(f"not valid Unicode: {error.reason}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise NotCanonicalError("an object names a key twice")
    return document


def _refuse_number(text: str) -> NoReturn:
    raise NotCanonicalError(f"number {text[:40]}: only integers")


def _small_integer(text: str) -> int:
    if len(text) > 17:
        raise NotCanonicalError(f"integer {text[:40]} is beyond 2^53 - 1")
    if text == "-0":
        raise NotCanonicalError("integer -0")
    return int(text)
