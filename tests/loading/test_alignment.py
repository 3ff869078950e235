"""Alignment against a plain loop, on made-up spans of any kind and on difficult text with real tokenizer types."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache.tokens import FIRST, LAST, MIDDLE, OTHER, TEXT, Tokens
from kdcache.data.encoding import EncodedTexts, encode
from kdcache.loading import alignment
from kdcache.loading.alignment import PartAlignment, align
from kdcache.testing import tiny

Rows = list[dict[int, float]]  # per student token: teacher token (within its text) -> weight


def reference(student: Tokens, teacher: Tokens) -> Rows:
    """What the module's docstring says, token by token."""
    rows: Rows = []
    for text in range(len(student.offsets) - 1):
        teacher_tokens = range(int(teacher.offsets[text]), int(teacher.offsets[text + 1]))
        for token in range(int(student.offsets[text]), int(student.offsets[text + 1])):
            shares = {}
            for other in teacher_tokens:
                share = _share(student, token, teacher, other)
                if share > 0:
                    shares[other - int(teacher.offsets[text])] = float(share)
            rows.append({other: share / sum(shares.values()) for other, share in shares.items()})
    return rows


def _share(student: Tokens, token: int, teacher: Tokens, other: int) -> int:
    if student.roles[token] != teacher.roles[other] or student.roles[token] == OTHER:
        return 0
    if student.roles[token] != TEXT:
        return 1
    if student.segments[token] != teacher.segments[other]:
        return 0
    start, end = max(student.starts[token], teacher.starts[other]), min(student.ends[token], teacher.ends[other])
    return max(0, int(end) - int(start))


def rows_of(aligned: PartAlignment) -> Rows:
    assert aligned.first is not None and aligned.src is not None and aligned.weight is not None
    bounds = zip(aligned.first[:-1], aligned.first[1:], strict=True)
    return [dict(zip(aligned.src[a:b].tolist(), aligned.weight[a:b].tolist(), strict=True)) for a, b in bounds]


def check(student: Tokens, teacher: Tokens) -> PartAlignment:
    aligned = align(student, teacher)
    found, expected = rows_of(aligned), reference(student, teacher)
    assert len(found) == len(expected) == aligned.tokens
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)
        assert not row or sum(row.values()) == pytest.approx(1.0, rel=1e-6)
    assert aligned.covered.tolist() == [bool(row) for row in expected]
    return aligned


def tokens(*texts: list[tuple[int, int, int, int]]) -> Tokens:
    """Tokens from (role, segment, start, end) per token."""
    flat = np.array([token for text in texts for token in text], np.int32).reshape(-1, 4)
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    return Tokens(
        offsets=offsets,
        starts=flat[:, 2],
        ends=flat[:, 3],
        segments=flat[:, 1].astype(np.int8),
        roles=flat[:, 0].astype(np.int8),
    )


@st.composite
def any_tokens(draw: Callable[[Any], Any], texts: int) -> Tokens:
    """Spans without any promise: unsorted, nested, equal, empty, of zero width, over both segments."""
    span = st.tuples(st.integers(0, 12), st.integers(0, 5)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    text_token = st.tuples(st.just(TEXT), st.integers(0, 1), span).map(lambda t: (t[0], t[1], *t[2]))
    special = st.sampled_from([(FIRST, -1, 0, 0), (MIDDLE, -1, 0, 0), (LAST, -1, 0, 0), (OTHER, -1, 0, 0)])
    return tokens(*(draw(st.lists(st.one_of(text_token, text_token, special), max_size=9)) for _ in range(texts)))


@given(st.integers(0, 4).flatmap(lambda texts: st.tuples(any_tokens(texts), any_tokens(texts))))
@settings(max_examples=150, deadline=None)
def test_any_spans_equal_the_plain_loop(pair: tuple[Tokens, Tokens]) -> None:
    check(*pair)


@given(st.integers(1, 3).flatmap(lambda texts: st.tuples(any_tokens(texts), any_tokens(texts))), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_a_bound_on_memory_changes_nothing(pair: tuple[Tokens, Tokens], bound: int) -> None:
    whole = align(*pair)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "_CANDIDATES_AT_ONCE", bound)
        pieces = align(*pair)
    assert rows_of(pieces) == rows_of(whole)


@given(st.integers(0, 3).flatmap(lambda texts: st.tuples(any_tokens(texts), any_tokens(texts))), st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_turns_out_to_be_the_identity_is_kept_as_such(pair: tuple[Tokens, Tokens], same: bool) -> None:
    student, teacher = pair[0], pair[0] if same else pair[1]
    aligned = align(student, teacher)
    lengths = np.diff(student.offsets).tolist()
    own = [{token: 1.0} for length in lengths for token in range(length)]
    identity = rows_of(aligned) == own and lengths == np.diff(teacher.offsets).tolist()
    assert aligned.simplified(student.offsets, teacher.offsets).identical == identity


def test_the_same_words_in_another_vocabulary_are_the_identity() -> None:
    texts = tokens([(FIRST, -1, 0, 0), (TEXT, 0, 0, 4), (LAST, -1, 0, 0)], [(TEXT, 0, 0, 1), (TEXT, 0, 2, 3)])
    assert align(texts, texts).simplified(texts.offsets, texts.offsets).identical


KINDS: dict[str, Callable[[], Any]] = {
    "uncased": tiny.wordpiece_tokenizer,
    "cased": lambda: tiny.wordpiece_tokenizer(lowercase=False, vocab_size=260),
    "byte-level": tiny.bytelevel_tokenizer,
    "sentencepiece": tiny.sentencepiece_tokenizer,
}


@cache
def tokenizer(kind: str) -> Any:
    return KINDS[kind]()


def as_tokens(encoded: EncodedTexts) -> Tokens:
    return Tokens(
        offsets=encoded.offsets,
        starts=encoded.starts,
        ends=encoded.ends,
        segments=encoded.segments,
        roles=encoded.roles,
    )


DIFFICULT = [
    "The crème brûlée was naïve, wasn't it?",
    "cre\u0300me combining e\u0301\u0302\u0323 marks a\u030a",
    "日本語 の テキスト and 한국어 ไทย",
    "family 👨‍👩‍👧‍👦 thumbs 👍🏽 flag 🇨🇿 smile 🙂",
    "control\x00\x01\x1f\u200bchars\ufeff \u00ad soft \u2028 line \t tab \r\n end",
    "   leading and   inner   spaces   ",
    "ﬁ ligature ½ ㎏ ﷺ Ⅷ İstanbul ß ẞ",
    "don't stop 3.14! <s> [SEP] </s> [CLS] [MASK]",
    "a" * 90,
    "\u0301\u0301",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "x",
]
pieces_of_text = st.one_of(
    st.sampled_from(DIFFICULT),
    st.text(max_size=12),
    st.sampled_from(["good", "film ", " the", "é", "👩‍💻", "\u0300", "\x07", "中文"]),
)
any_text = st.lists(pieces_of_text, min_size=1, max_size=5).map("".join)
two_kinds = st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(KINDS)))
lengths = st.sampled_from([5, 8, 16, 128])


@given(two_kinds, st.lists(any_text.map(lambda text: (text,)), min_size=1, max_size=4), lengths, lengths)
@settings(max_examples=60, deadline=None)
def test_real_tokenizers_on_single_texts(
    kinds: tuple[str, str], texts: list[tuple[str]], student: int, teacher: int
) -> None:
    check(
        as_tokens(encode(tokenizer(kinds[0]), texts, student)), as_tokens(encode(tokenizer(kinds[1]), texts, teacher))
    )


@given(
    two_kinds, st.lists(st.tuples(any_text, st.one_of(any_text, st.just(""))), min_size=1, max_size=3), lengths, lengths
)
@settings(max_examples=60, deadline=None)
def test_real_tokenizers_on_pairs(
    kinds: tuple[str, str], texts: list[tuple[str, str]], student: int, teacher: int
) -> None:
    student, teacher = max(student, 6), max(teacher, 6)
    check(
        as_tokens(encode(tokenizer(kinds[0]), texts, student)), as_tokens(encode(tokenizer(kinds[1]), texts, teacher))
    )


@pytest.mark.parametrize("student", sorted(KINDS))
@pytest.mark.parametrize("teacher", sorted(KINDS))
def test_every_difficult_text_in_every_pairing(student: str, teacher: str) -> None:
    texts = [(first, second) for first, second in zip(DIFFICULT, reversed(DIFFICULT), strict=True)]
    encoded = as_tokens(encode(tokenizer(student), texts, 64))
    aligned = check(encoded, as_tokens(encode(tokenizer(teacher), texts, 64)))
    special = encoded.roles != TEXT
    assert aligned.covered[special].all(), "special tokens always meet"


@pytest.mark.parametrize("kind", ["uncased", "cased"])
def test_the_fast_path_of_one_tokenizer_is_what_spans_would_give(kind: str) -> None:
    encoded = as_tokens(encode(tokenizer(kind), [("the film is good",), ("a very dull plot",)], 64))
    aligned = align(encoded, encoded)
    assert rows_of(aligned) == [{token: 1.0} for length in np.diff(encoded.offsets) for token in range(length)]
    fast = align(encoded, encoded, identical=True)
    assert fast.identical and fast.covered.all() and fast.tokens == aligned.tokens and fast.nbytes == 0


def test_specials_meet_by_role_and_segments_never_mix() -> None:
    bert = tokens([(FIRST, -1, 0, 0), (TEXT, 0, 0, 4), (MIDDLE, -1, 0, 0), (TEXT, 1, 0, 4), (LAST, -1, 0, 0)])
    roberta = tokens([(FIRST, -1, 0, 0), (TEXT, 0, 0, 2), (TEXT, 0, 2, 4), (MIDDLE, -1, 0, 0), (MIDDLE, -1, 0, 0),
                      (TEXT, 1, 0, 4), (LAST, -1, 0, 0)])  # fmt: skip
    assert rows_of(align(bert, roberta)) == [{0: 1.0}, {1: 0.5, 2: 0.5}, {3: 0.5, 4: 0.5}, {5: 1.0}, {6: 1.0}]
    assert rows_of(align(roberta, bert)) == [{0: 1.0}, {1: 1.0}, {1: 1.0}, {2: 1.0}, {2: 1.0}, {3: 1.0}, {4: 1.0}]


def test_truncation_masks_what_the_teacher_did_not_see_and_keeps_the_last_token() -> None:
    text = [("good " * 20,)]
    student = as_tokens(encode(tokenizer("uncased"), text, 32))
    aligned = check(student, as_tokens(encode(tokenizer("byte-level"), text, 12)))
    assert 0 < aligned.covered.sum() < aligned.tokens
    assert aligned.covered[0] and aligned.covered[-1]
    assert not aligned.covered[-2]


def test_texts_of_two_lists_must_be_the_same_texts() -> None:
    with pytest.raises(ValueError, match="2 texts of the student, 1 of the teacher"):
        align(tokens([], []), tokens([]))
