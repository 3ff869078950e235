"""Transfer texts with logits only, beside texts with hidden states: right targets, even batches, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kdcache.cache.ids import text_id
from kdcache.data.encoding import encode
from kdcache.loading.order import epoch_order
from kdcache.testing import tiny
from kdcache.testing.memory_cache import MemoryCache, MemoryTeacher, truth_logits
from tests.loading.test_loader import MAP, batches_of, expected_row, same, texts

if TYPE_CHECKING:
    from kdcache.loading.targets import Batch

FULL, TRANSFER = 30, 42  # texts with hidden states (8 of them transfer texts), and with logits only


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {
        "student": tiny.wordpiece_tokenizer(),
        "roberta": tiny.bytelevel_tokenizer(),
        "xlm": tiny.sentencepiece_tokenizer(),
    }


def mixed_cache(tokenizers: dict[str, Any], dtype: str = "float32", names: tuple[str, ...] = tuple(MAP)) -> MemoryCache:
    """Parts of 6: 5 full ones, then 7 with logits only."""
    known = texts(FULL + TRANSFER)
    parts = [known[start : start + 6] for start in range(0, len(known), 6)]
    of = {"bert": tokenizers["student"], **tokenizers}
    teachers = {name: MemoryTeacher(of[name], dtype=dtype) for name in names}
    splits = {
        "train": [(text, index % 2) for index, text in enumerate(known[: FULL - 8])],
        "transfer": [(text, -1) for text in known[FULL - 8 :]],
    }
    return MemoryCache(parts, teachers, splits, scopes=["full"] * 5 + ["logits"] * 7)


def check(batch: Batch, cache: MemoryCache, tokenizers: dict[str, Any], tolerance: float = 1e-5) -> int:
    """Compare a batch with a plain loop over its rows; returns the number of rows with hidden states."""
    by_id = {text_id(text): text for part in cache.part_texts for text in part}
    in_full = {text_id(text) for part in cache.part_texts[:5] for text in part}
    rows = [by_id[one.tobytes()] for one in batch.text_ids]
    length = batch.inputs["input_ids"].shape[1]
    assert batch.targets is not None
    for index, teacher in enumerate(batch.targets.teachers):
        wanted = np.stack([truth_logits(teacher, text, 2) for text in rows])
        assert np.array_equal(batch.targets.logits[index].numpy(), wanted)
        for student_layer, layer in enumerate(MAP[teacher], start=1):
            hidden = batch.targets.hidden[index, student_layer]
            places = {
                row * length + token: value
                for row, text in enumerate(rows)
                if text_id(text) in in_full
                for token, value in expected_row(cache, tokenizers, teacher, layer, text).items()
            }
            assert hidden.positions.tolist() == sorted(places)
            assert hidden.count == len(places)
            if places:
                expected = np.stack([places[place] for place in sorted(places)])
                np.testing.assert_allclose(hidden.aligned().numpy(), expected, atol=tolerance)
            else:
                assert hidden.aligned().shape == (0, cache.teachers[teacher].layers[layer].dim)
    return sum(text_id(text) in in_full for text in rows)


@pytest.mark.parametrize("names", [("bert",), ("roberta",), tuple(MAP)], ids="-".join)
def test_only_texts_with_hidden_states_get_hidden_targets(tokenizers: dict[str, Any], names: tuple[str, ...]) -> None:
    """Also where the teacher has the student's tokens, so that no alignment is looked up."""
    cache = mixed_cache(tokenizers, names=names)
    source = batches_of(cache, tokenizers, teachers=names)
    seen, with_hidden = [], 0
    for batch in source.batches(0):
        with_hidden += check(batch, cache, tokenizers)
        seen += [one.tobytes() for one in batch.text_ids]
        for piece in batch.split(3):
            check(piece, cache, tokenizers)
    assert sorted(seen) == sorted(text_id(text) for rows in cache.split_rows.values() for text, _ in rows)
    assert (with_hidden, source.skipped) == (FULL, 0)
    assert source.coverage["bert" if "bert" in names else "roberta"] > 0.9, "over the parts with hidden states"


@pytest.mark.parametrize("dtype", ["float16", "int8", "float8"])
def test_parts_without_hidden_states_have_the_records_of_the_others(tokenizers: dict[str, Any], dtype: str) -> None:
    cache = mixed_cache(tokenizers, dtype)
    for batch in batches_of(cache, tokenizers).batches(0):
        check(batch, cache, tokenizers, tolerance=0.3)


def test_hidden_states_of_logits_only_parts_are_not_read(tokenizers: dict[str, Any]) -> None:
    cache = mixed_cache(tokenizers)
    assert len(list(batches_of(cache, tokenizers).batches(0)))
    read = {what.split()[0] for what, part in cache.reads if part >= 5}
    assert read == {"texts", "outputs"}


def test_every_batch_has_its_share_of_both_kinds(tokenizers: dict[str, Any]) -> None:
    """Few parts with labelled rows among many without: they must not come all at once."""
    cache = mixed_cache(tokenizers)
    for epoch in (0, 1):
        shares = [
            check(batch, cache, tokenizers) for batch in batches_of(cache, tokenizers, batch_size=12).batches(epoch)
        ]
        assert all(4 <= share <= 6 for share in shares), "12 * 30 / 72 = 5"


def test_a_batch_without_any_hidden_state_has_empty_targets(tokenizers: dict[str, Any]) -> None:
    cache = mixed_cache(tokenizers)
    shares = [check(batch, cache, tokenizers) for batch in batches_of(cache, tokenizers, batch_size=1).batches(0)]
    assert sorted(set(shares)) == [0, 1]


@pytest.mark.parametrize("window", [2, "all"])
def test_an_epoch_continues_in_the_middle(tokenizers: dict[str, Any], window: Any) -> None:
    cache = mixed_cache(tokenizers)
    whole = list(batches_of(cache, tokenizers, window=window).batches(2))
    for first in (1, 5, len(whole) - 1):
        rest = list(batches_of(cache, tokenizers, window=window).batches(2, first))
        assert all(same(a, b) for a, b in zip(rest, whole[first:], strict=True))


def test_processes_partition_every_step(tokenizers: dict[str, Any]) -> None:
    cache = mixed_cache(tokenizers)
    ranks = [batches_of(cache, tokenizers, rank=rank, world=2) for rank in range(2)]
    for whole, *shares in zip(
        batches_of(cache, tokenizers).batches(0), *(one.batches(0) for one in ranks), strict=True
    ):
        assert sorted(row.tobytes() for share in shares for row in share.text_ids) == sorted(map(bytes, whole.text_ids))
        for share in shares:
            check(share, cache, tokenizers)


def test_without_logits_such_texts_are_left_out(tokenizers: dict[str, Any]) -> None:
    cache = mixed_cache(tokenizers)
    source = batches_of(cache, tokenizers, logits=False)
    assert sum(len(batch) for batch in source.batches(0)) == FULL
    assert source.skipped == 0


def test_the_window_of_each_kind_slides() -> None:
    parts = np.repeat(np.arange(40), 50)
    logits_only = parts >= 8
    order = epoch_order(parts, seed=1, epoch=0, window=3, logits_only=logits_only)
    assert sorted(order.tolist()) == list(range(len(parts)))
    for kind in (False, True):
        own = order[logits_only[order] == kind]
        alive = {part: np.flatnonzero(parts[own] == part) for part in np.unique(parts[own])}
        at_once = [sum(places[0] <= step <= places[-1] for places in alive.values()) for step in range(len(own))]
        assert max(at_once) <= 3 + 1
    share = np.cumsum(~logits_only[order]) / np.arange(1, len(order) + 1)
    assert np.abs(share[50:] - 0.2).max() < 0.02


def test_the_order_without_such_texts_is_that_of_0_1_0() -> None:
    order = epoch_order(np.repeat(np.arange(4), 3), seed=7, epoch=1, window=2)
    assert order.tolist() == [7, 8, 3, 4, 6, 5, 1, 2, 11, 10, 0, 9]


def test_pieces_of_a_batch_keep_the_rows_of_their_means(tokenizers: dict[str, Any]) -> None:
    """A mean per text, of some rows: bags, their rows, and both after a cut."""
    from kdcache.loading.assembly import PaddedBatches, StepRows, text_indices
    from kdcache.loading.parts import DecodedPart
    from kdcache.loading.targets import Batch, Targets

    lines = texts(7)
    encoded = encode(tokenizers["student"], lines, 64)
    parts = [DecodedPart(encoded, ()), DecodedPart(encoded, (), logits_only=True)]
    kinds = np.array([0, 1, 1, 0, 0, 1, 0])
    rows = StepRows(parts, kinds, np.arange(7), np.array([0, 7]))
    padded = PaddedBatches(rows)
    (indices,) = text_indices("pooled", padded)
    (first,) = text_indices("first", padded)
    keep = np.flatnonzero(kinds == 0)
    length = padded.shapes[0][1]
    assert indices.bag_rows is not None and indices.bag_rows.tolist() == keep.tolist()
    assert first.positions.tolist() == (keep * length).tolist()
    values = torch.arange(len(keep), dtype=torch.float32)[:, None] + 1
    states = torch.randn(7 * length, 3, generator=torch.Generator().manual_seed(0))
    hidden = indices.target(values, None, None)
    lengths = encoded.lengths
    expected = torch.stack([states[row * length : row * length + lengths[row]].mean(0) for row in keep.tolist()])
    torch.testing.assert_close(hidden.of_student(states), expected)
    mask = torch.from_numpy((np.arange(length) < lengths[:, None]).astype(np.int64))
    batch = Batch(
        {"attention_mask": mask},
        torch.zeros(7),
        np.zeros((7, 16)),
        Targets(("a",), torch.zeros(1, 7, 0), {(0, 1): hidden}),
    )
    found, at = [], 0
    for piece in batch.split(3):
        assert piece.targets is not None
        own = piece.targets.hidden[0, 1]
        width = piece.inputs["attention_mask"].shape[1]
        local = states.view(7, length, 3)[at : at + len(piece), :width].flatten(0, 1)
        found.append(own.of_student(local))
        assert (own.rows(width) + at).tolist() == [row for row in keep.tolist() if at <= row < at + len(piece)]
        at += len(piece)
    torch.testing.assert_close(torch.cat(found), expected)
