"""Canonical JSON (RFC 8785) of integers and strings, and a JSON reader that takes nothing else.

Two programs that hold the same document must agree on its bytes, or identities mean nothing. Fractions are the only
hard part of RFC 8785 and have no place in a manifest: a score is a string. So the canonical form is short enough to
write in any language: keys sorted by UTF-16 code units, no white space, the shortest string escapes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

MAX_INTEGER = 2**53 - 1  # what every JSON reader keeps exactly
MAX_DEPTH = 16


class NotCanonicalError(ValueError):
    """The value, or the text, has no canonical form here."""


def canonical_json(value: Any) -> bytes:
    """The RFC 8785 form, as UTF-8.

    Raises NotCanonicalError for fractions, null, booleans, half surrogates and large integers.
    """
    text = json.dumps(ordered(value), ensure_ascii=False, separators=(",", ":"))
    return _encode(text)


def readable_json(value: Any) -> bytes:
    """The same document in the same order with line breaks, for people; its canonical form is that of ``value``."""
    return _encode(json.dumps(ordered(value), ensure_ascii=False, indent=1) + "\n")


def digest_of(value: Any) -> str:
    """sha256 (hex) of the canonical form."""
    return digest_of_ordered(ordered(value))


def digest_of_ordered(value: Any) -> str:
    """The same of what ``ordered`` or ``parse_json`` gave back.

    A manifest has ten thousand files, and sorting is most of the work.
    """
    return hashlib.sha256(_encode(json.dumps(value, ensure_ascii=False, separators=(",", ":")))).hexdigest()


def ordered(value: Any, depth: int = 0) -> Any:
    """``value`` with every object's keys in canonical order, checked all the way down."""
    if depth > MAX_DEPTH:
        raise NotCanonicalError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return _unicode(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > MAX_INTEGER:
            raise NotCanonicalError(f"integer {value} is beyond 2^53 - 1")
        return value
    if isinstance(value, dict | Mapping):  # a dict is told at once
        if not all(isinstance(key, str) for key in value):
            raise NotCanonicalError("keys must be strings")
        return {key: ordered(value[key], depth + 1) for key in _in_order(value)}
    if isinstance(value, list | tuple):
        return [ordered(item, depth + 1) for item in value]
    raise NotCanonicalError(f"{type(value).__name__} {value!r}: only objects, lists, strings and integers")


def parse_json(data: bytes) -> Any:
    """Parse JSON of objects, lists, strings and integers.

    Raises NotCanonicalError for all else, duplicate keys among it.
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
    """By UTF-16 code units; for ASCII that is how Python sorts strings."""
    if all(map(str.isascii, keys)):
        return sorted(keys)
    return sorted(map(_unicode, keys), key=lambda key: key.encode("utf-16-be"))


def _unicode(text: str) -> str:
    """``text`` itself; half of a surrogate pair has no UTF-8 form."""
    if not text.isascii():
        _encode(text)
    return text


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotCanonicalError(f"not valid Unicode: {error.reason}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise NotCanonicalError("an object names a key twice")
    return made


def _refuse_number(text: str) -> NoReturn:
    raise NotCanonicalError(f"number {text[:40]}: only integers")


def _small_integer(text: str) -> int:
    if len(text) > 17:
        raise NotCanonicalError(f"integer {text[:40]} is beyond 2^53 - 1")
    if text == "-0":
        raise NotCanonicalError("integer -0")
    return int(text)
