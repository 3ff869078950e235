"""Canonical JSON against the examples of RFC 8785, and what it refuses."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache.canonical import NotCanonicalError, canonical_json, digest_of, parse_json, readable_json

VALUES = st.recursive(
    st.integers(-(2**53) + 1, 2**53 - 1) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=20,
)


def test_keys_are_sorted_by_utf16_as_in_section_3_2_3() -> None:
    value = {
        "\u20ac": "Euro Sign",
        "\r": "Carriage Return",
        "\ufb33": "Hebrew Letter Dalet With Dagesh",
        "1": "One",
        "\U0001f600": "Emoji: Grinning Face",
        "\u0080": "Control",
        "\u00f6": "Latin Small Letter O With Diaeresis",
    }
    expected = (
        '{"\\r":"Carriage Return","1":"One","\u0080":"Control","ö":"Latin Small Letter O With Diaeresis",'
        '"€":"Euro Sign","😀":"Emoji: Grinning Face","\ufb33":"Hebrew Letter Dalet With Dagesh"}'
    )
    assert canonical_json(value) == expected.encode()


def test_strings_are_escaped_as_in_section_3_2_2() -> None:
    text = "€$\u000f\u000aA'\u0042\u0022\u005c\\\"\u002f"  # the string of the RFC's example
    assert canonical_json(text) == b'"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'
    assert canonical_json("\b\t\n\f\r\x00\x1f\x7f\u2028") == '"\\b\\t\\n\\f\\r\\u0000\\u001f\x7f\u2028"'.encode()


def test_white_space_and_order_make_no_difference() -> None:
    assert canonical_json(parse_json(b'{ "b" : [ 1 , -2, {} ],\n "a": "x" }')) == b'{"a":"x","b":[1,-2,{}]}'
    assert digest_of({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()


@given(VALUES)
def test_readable_and_canonical_forms_hold_the_same(value: object) -> None:
    assert parse_json(canonical_json(value)) == value == parse_json(readable_json(value))
    assert canonical_json(json.loads(readable_json(value))) == canonical_json(value)


@pytest.mark.parametrize("value", [1.5, None, True, 2**53, -(2**53), "\ud800", {1: "x"}, b"bytes"])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(NotCanonicalError):
        canonical_json(value)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":2}',
        "1.0",
        "1e3",
        "NaN",
        "-Infinity",
        "null",
        "true",
        "9007199254740992",
        "1" * 5000,
        '"\\ud800"',
        "{",
        "[" * 100000,
        "[" * 40 + "]" * 40,
        "-0",
        '{"a":1} x',
    ],
)
def test_json_of_anything_else_is_refused(text: str) -> None:
    with pytest.raises(NotCanonicalError):
        canonical_json(parse_json(text.encode()))


def test_bytes_that_are_not_utf8_are_refused() -> None:
    with pytest.raises(NotCanonicalError):
        parse_json(b'"\xff"')
