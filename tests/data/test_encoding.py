"""Encoding.

The same tokens as transformers gives, spans that lie in the text, roles of special tokens, no state left behind.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache.tokens import FIRST, LAST, MIDDLE, OTHER, TEXT
from kdcache.data.encoding import (
    EncodedTexts,
    encode,
    load_tokenizer,
    pad,
    token_budget_batches,
    tokenizer_fingerprint,
    tokenizer_json,
)
from kdcache.errors import ModelError, RecipeError
from kdcache.testing.tiny import bytelevel_tokenizer, sentencepiece_tokenizer, wordpiece_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZERS = {
    "uncased WordPiece": wordpiece_tokenizer(),
    "cased WordPiece": wordpiece_tokenizer(lowercase=False, vocab_size=260),
    "byte-level BPE": bytelevel_tokenizer(),
    "Unigram": sentencepiece_tokenizer(),
}
HARD = [
    "crème brûlée",
    "日本語 の テキスト",
    "ok 🙂👍🏽👨‍👩‍👧",
    "e\u0301 a\u200bb",
    "\u0001",
    "a  b",
    "[SEP] <s> </s>",
    "ＡＢ ½ ﬁ",
    "x" * 300,
    " lead",
    "trail ",
]
tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
some_text = st.one_of(st.sampled_from(HARD), st.text(min_size=1, max_size=40))
batches = st.one_of(
    st.lists(st.tuples(some_text), min_size=1, max_size=6),
    st.lists(st.tuples(some_text, some_text), min_size=1, max_size=6),
)


def rows_of(values: np.ndarray, encoded: EncodedTexts) -> list[list[int]]:
    return [row.tolist() for row in np.split(values, encoded.offsets[1:-1])]


@tokenizers
@given(texts=batches, max_length=st.integers(6, 40))
@settings(max_examples=40)
def test_tokens_are_those_of_transformers_and_spans_lie_in_their_column(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, ...]], max_length: int
) -> None:
    encoded = encode(tokenizer, texts, max_length)
    columns = [list(column) for column in zip(*texts, strict=True)]
    expected = tokenizer(*columns, truncation="longest_first", max_length=max_length, return_offsets_mapping=True)
    assert rows_of(encoded.input_ids, encoded) == expected["input_ids"]
    spans = [[tuple(span) for span in row] for row in expected["offset_mapping"]]
    assert list(zip(encoded.starts.tolist(), encoded.ends.tolist(), strict=True)) == [
        span for row in spans for span in row
    ]
    if "token_type_ids" in tokenizer.model_input_names:
        assert encoded.token_type_ids is not None
        assert rows_of(encoded.token_type_ids, encoded) == expected["token_type_ids"]
    assert len(encoded) == len(texts)
    assert (encoded.lengths <= max_length).all()
    for row, text in enumerate(texts):
        piece = slice(encoded.offsets[row], encoded.offsets[row + 1])
        for start, end, segment in zip(
            encoded.starts[piece], encoded.ends[piece], encoded.segments[piece], strict=True
        ):
            assert 0 <= start <= end <= (len(text[segment]) if segment >= 0 else 0)
    assert ((encoded.roles == TEXT) == (encoded.segments >= 0)).all()
    middles = 0 if len(texts[0]) == 1 else 2 if tokenizer.sep_token == "</s>" else 1
    for roles in rows_of(encoded.roles, encoded):
        assert (roles[0], roles[-1]) == (FIRST, LAST)
        assert roles.count(MIDDLE) == middles


maybe_empty = st.one_of(st.sampled_from(["", " ", "\u200b", "\u3000"]), some_text)
batches_with_empty = st.one_of(
    st.lists(st.tuples(maybe_empty), min_size=1, max_size=6),
    st.lists(st.tuples(maybe_empty, maybe_empty), min_size=1, max_size=6),
)


@tokenizers
@given(texts=batches_with_empty, max_length=st.integers(6, 40))
@settings(max_examples=80)
def test_what_was_cut_is_what_has_more_tokens_uncut(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, ...]], max_length: int
) -> None:
    encoded, whole = encode(tokenizer, texts, max_length), encode(tokenizer, texts, 10_000)
    assert encoded.truncated is not None and whole.truncated is not None
    assert encoded.truncated.tolist() == (whole.lengths > encoded.lengths).tolist()
    assert encoded.truncated_count == int((whole.lengths > max_length).sum())
    assert not whole.truncated.any()
    rows = list(range(len(texts)))[::-1]
    assert encoded.select(rows).truncated_count == encoded.truncated_count


@tokenizers
@pytest.mark.parametrize("empty", ["", "   ", "\u200b"])
def test_an_empty_column_of_a_pair_leaves_spans_and_roles_as_they_are(
    tokenizer: PreTrainedTokenizerBase, empty: str
) -> None:
    middles = 2 if tokenizer.sep_token == "</s>" else 1
    for max_length in (8, 64):
        encoded = encode(
            tokenizer,
            [("the film is good", empty), (empty, "the film is good"), (empty, empty), ("a", "b")],
            max_length,
        )
        for row, (roles, segments) in enumerate(
            zip(rows_of(encoded.roles, encoded), rows_of(encoded.segments, encoded), strict=True)
        ):
            assert (roles[0], roles[-1], roles.count(MIDDLE)) == (FIRST, LAST, middles)
            if empty == "":
                assert {segment for segment in segments if segment >= 0} == [{0}, {1}, set(), {0, 1}][row]


def test_a_text_of_which_nothing_is_left_becomes_one_special_token() -> None:
    from tokenizers import processors

    tokenizer = wordpiece_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B:1", special_tokens=[]
    )
    encoded = encode(tokenizer, [("\u200b",), ("the film",), ("\x01",)], 8)
    assert encoded.lengths.tolist()[::2] == [1, 1]
    assert encoded.roles.tolist() == [OTHER, *[TEXT] * encoded.lengths[1], OTHER]
    assert encoded.input_ids[0] == tokenizer.unk_token_id
    assert encoded.segments.tolist()[0] == -1


@tokenizers
def test_spans_count_code_points_and_cover_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "crème 🙂 e\u0301 film"
    encoded = encode(tokenizer, [(text,)], 64)
    covered = {place for start, end in zip(encoded.starts, encoded.ends, strict=True) for place in range(start, end)}
    assert covered >= {place for place, character in enumerate(text) if character not in " \u0301"}
    assert encoded.ends.max() == len(text) == 15
    assert text[encoded.starts[-2] : encoded.ends[-2]].strip() == "film"


@pytest.mark.parametrize(
    ("template", "single", "pair"),
    [
        (("$A [SEP] [CLS]", "$A [SEP] $B:1 [SEP]:1 [CLS]:2"), [TEXT, LAST, OTHER], [TEXT, MIDDLE, TEXT, LAST, OTHER]),
        (
            ("[CLS] [MASK] $A [SEP]", "[CLS] [MASK] $A $B:1 [SEP]:1"),
            [FIRST, OTHER, TEXT, LAST],
            [FIRST, OTHER, TEXT, TEXT, LAST],
        ),
        (("$A", "$A $B:1"), [TEXT], [TEXT, TEXT]),
    ],
)
def test_other_templates_have_other_roles(template: tuple[str, str], single: list[int], pair: list[int]) -> None:
    from tokenizers import processors

    tokenizer = wordpiece_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]", "[MASK]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template[0], pair=template[1], special_tokens=special
    )
    assert encode(tokenizer, [("film",)], 8).roles.tolist() == single
    assert encode(tokenizer, [("film", "film")], 8).roles.tolist() == pair


def test_an_empty_batch_is_fine() -> None:
    encoded = encode(TOKENIZERS["uncased WordPiece"], [], 8)
    assert len(encoded) == 0
    assert encoded.token_type_ids is not None
    assert encoded.input_ids.dtype == np.int32


def test_many_texts_are_encoded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [(f"film {row} is good",) for row in range(10)]
    whole = encode(TOKENIZERS["byte-level BPE"], texts, 32)
    monkeypatch.setattr("kdcache.data.encoding._CHUNK", 3)
    chunked = encode(TOKENIZERS["byte-level BPE"], texts, 32)
    assert chunked.token_type_ids is None
    for name in ("input_ids", "offsets", "starts", "ends", "segments", "roles"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(chunked, name))


@tokenizers
def test_the_state_of_the_tokenizer_is_left_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(7, stride=2, strategy="only_first", direction="left")
    backend.enable_padding(length=9, pad_id=1, pad_token="x")
    before = backend.to_str()
    encoded = encode(tokenizer, [("the film is good",)], 32)
    assert encoded.lengths[0] > 4
    assert backend.to_str() == before
    backend.no_truncation()
    backend.no_padding()
    encode(tokenizer, [("the film is good",)], 32)
    assert (backend.truncation, backend.padding) == (None, None)


def test_threads_may_share_a_tokenizer() -> None:
    tokenizer = TOKENIZERS["uncased WordPiece"]
    texts = [("the film is good and the story is warm",)] * 50
    with ThreadPoolExecutor(4) as pool:
        lengths = list(pool.map(lambda cut: set(encode(tokenizer, texts, cut).lengths.tolist()), [4, 5, 6, 7] * 10))
    assert lengths == [{4}, {5}, {6}, {7}] * 10


@pytest.mark.parametrize(
    ("texts", "max_length", "message"),
    [
        ([("a",)], 2, "max_length 2 does not fit tokenizer"),
        ([("a", "b")], 4, "it adds 3 special tokens, so at least 5 are needed"),
        ([("a",)], int(1e30), "no more than 2147483647 are possible"),
        ([("a",), ("a", "b")], 8, "all alike; the first one here has 1"),
        ([("a", "b", "c")], 8, "the first one here has 3"),
    ],
)
def test_what_cannot_be_encoded_is_told(texts: list[tuple[str, ...]], max_length: int, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        encode(TOKENIZERS["uncased WordPiece"], texts, max_length)
    assert message in caught.value.message


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        name_or_path = "old-model"

    slow: Any = Slow()
    with pytest.raises(ModelError, match="Slow of 'old-model' is a slow one"):
        encode(slow, [("a",)], 8)


@tokenizers
def test_the_fingerprint_survives_use_and_saving(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["the film", "the story is warm"], padding=True, truncation=True, max_length=8)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_fingerprint(loaded) == before
    loaded.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "again"))) == before


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    fingerprints = {tokenizer_fingerprint(tokenizer) for tokenizer in TOKENIZERS.values()}
    changed = wordpiece_tokenizer()
    changed.add_tokens(["newword"])
    assert len(fingerprints | {tokenizer_fingerprint(changed)}) == 5
    assert tokenizer_fingerprint(wordpiece_tokenizer()) in fingerprints


def test_tokenizer_json_is_canonical_and_loads() -> None:
    from tokenizers import Tokenizer

    tokenizer = TOKENIZERS["Unigram"]
    text = tokenizer_json(tokenizer)
    document = json.loads(text)
    assert document["truncation"] is None
    assert document["padding"] is None
    assert text == json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    sample = "日本語 naïve film"
    assert Tokenizer.from_str(text).encode(sample).ids == tokenizer(sample)["input_ids"]


def test_load_tokenizer_reads_a_saved_model(tiny_models: dict[str, Path]) -> None:
    for directory in tiny_models.values():
        tokenizer = load_tokenizer(str(directory))
        assert encode(tokenizer, [("the film is good",)], 16).roles[-1] == LAST


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "could be loaded from the directory"),
        ({"config.json": '{"model_type": "bert"}'}, "it holds a model, but no tokenizer files"),
        ({"config.json": '{"model_type": "xlm-roberta"}'}, "it holds a model, but no tokenizer files"),
        ({"config.json": '{"model_type": "bert"}', "tokenizer.json": "{"}, "could be loaded from the directory"),
    ],
)
def test_directories_without_a_tokenizer_are_told(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in caught.value.message
    assert message in caught.value.message


def test_a_name_that_is_no_directory_and_no_known_model_names_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no tokenizer could be loaded from 'acme/nothing'") as caught:
        load_tokenizer("acme/nothing")
    assert str(tmp_path / "acme" / "nothing") in caught.value.message


def ragged(lengths: list[int], *, types: bool = True) -> EncodedTexts:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    ids, small = np.arange(1, total + 1, dtype=np.int32), np.arange(total, dtype=np.int8)
    return EncodedTexts(ids, offsets, ids + 1, ids + 2, small, small + 1, small % 2 if types else None)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=10), st.data())
def test_select_and_pad_pick_the_same_rows(lengths: list[int], data: st.DataObject) -> None:
    encoded = ragged(lengths)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=12))
    selected = encoded.select(rows)
    assert selected.lengths.tolist() == [lengths[row] for row in rows]
    batch = pad(encoded, np.array(rows), pad_token_id=99)
    again = pad(selected, np.arange(len(rows)), pad_token_id=99)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    for name, values in batch.items():
        assert values.dtype == torch.int64
        assert values.shape == (len(rows), max(lengths[row] for row in rows))
        assert torch.equal(values, again[name])
    for place, row in enumerate(rows):
        length = lengths[row]
        assert batch["input_ids"][place, :length].tolist() == rows_of(encoded.input_ids, encoded)[row]
        assert batch["input_ids"][place, length:].eq(99).all()
        assert batch["attention_mask"][place].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert batch["token_type_ids"][place, length:].eq(0).all()
        for field in ("starts", "ends", "segments", "roles"):
            assert rows_of(getattr(selected, field), selected)[place] == rows_of(getattr(encoded, field), encoded)[row]


def test_selecting_and_padding_no_rows() -> None:
    encoded = ragged([2, 3], types=False)
    assert len(encoded.select([])) == 0
    assert {name: tuple(values.shape) for name, values in pad(encoded, [], 0).items()} == {
        "input_ids": (0, 0),
        "attention_mask": (0, 0),
    }


@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 500))
def test_token_budget_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    found = token_budget_batches(np.array(lengths, dtype=np.int64), budget)
    rows = np.concatenate([np.empty(0, np.int64), *found])
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget


def test_token_budget_batches_keep_the_order_of_equal_lengths() -> None:
    assert [batch.tolist() for batch in token_budget_batches(np.array([3, 5, 3, 5, 1]), 6)] == [[1], [3], [0, 2], [4]]
