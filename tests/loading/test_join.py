"""Joined examples: the right place and id for every one, in few bytes, however many there are."""

from __future__ import annotations

import numpy as np
import pytest

from kdcache.cache.ids import Examples
from kdcache.errors import MismatchError
from kdcache.loading.examples import join_examples
from kdcache.testing import tiny
from kdcache.testing.memory_cache import MemoryCache

TEXTS = [(text,) for text, _ in tiny.reviews(400, seed=5)]


@pytest.fixture(scope="module")
def cache() -> MemoryCache:
    """Examples in another order than their texts, some of which serve twice; the last part is no part of the split."""
    order = np.random.default_rng(0).permutation(np.r_[0:300, 0:60])
    parts = [TEXTS[start : start + 64] for start in range(0, len(TEXTS), 64)]
    return MemoryCache(parts, {}, {"train": [(TEXTS[place], int(place) % 3 - 1) for place in order]})


def test_ids_and_labels_are_those_of_the_split(cache: MemoryCache) -> None:
    joined, table = join_examples(cache, cache.examples, ("train",)), cache.examples("train")
    some = np.array([5, 5, 0, 359, 17])
    assert (joined.text_ids[:] == table.text_ids).all() and (joined.text_ids[some] == table.text_ids[some]).all()
    assert (joined.labels[some] == table.labels[some]).all() and joined.labels[some].dtype == np.int64
    for part, row, text_id in zip(joined.parts, joined.rows[:], joined.text_ids[:], strict=True):
        assert (cache.text_ids(cache.parts[part].name)[row] == text_id).all()


def test_what_stays_of_an_example_is_a_few_bytes(cache: MemoryCache) -> None:
    joined = join_examples(cache, cache.examples, ("train",))
    kept = [joined.parts, vars(joined.rows)["_values"], vars(joined.labels)["_values"]]
    assert all(array.base is None for array in kept), "a view keeps the bytes of a whole file"
    assert sum(array.nbytes for array in kept) <= 8 * len(joined)


def test_a_split_without_rows_has_nothing_to_join(cache: MemoryCache) -> None:
    nothing = Examples(np.zeros((0, 16), np.uint8), np.zeros(0, np.int64), None)
    with pytest.raises(MismatchError, match="the text of none of the 0 examples of 'train'"):
        join_examples(cache, lambda _: nothing, ("train",))  # type: ignore[arg-type]
