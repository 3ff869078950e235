"""Text ids: a worked vector that docs/cache-format.md repeats, and finding rows by id."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache.ids import IdIndex, id_array, id_list, ids_digest, match, seeded_order, seeded_rows, text_id
from kdcache.errors import DataError


def test_worked_vector() -> None:
    assert text_id(["a fine film"]).hex() == "6b788f3d0d5201d4894e69126378a6ca"
    data = bytes.fromhex("0b00000000000000") + b"a fine film"
    assert hashlib.blake2b(data, digest_size=16).digest() == text_id(["a fine film"])
    assert (
        text_id(["crème", "日本"])
        == hashlib.blake2b(
            b"\x06\0\0\0\0\0\0\0cr\xc3\xa8me\x06\0\0\0\0\0\0\0\xe6\x97\xa5\xe6\x9c\xac", digest_size=16
        ).digest()
    )


def test_columns_are_kept_apart() -> None:
    assert len({text_id(columns) for columns in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["", "abc"])}) == 5


@pytest.mark.parametrize("count", [0, 1, 700])
def test_the_digest_of_a_set_of_texts_is_that_of_its_sorted_ids(count: int) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)
    ids[::5, :9] = 200
    given = [ids[:300], ids[100:], ids[::-1]]
    wanted = hashlib.sha256(b"".join(sorted(set(id_list(ids))))).hexdigest()
    assert ids_digest(given) == ids_digest([ids]) == wanted
    rows = seeded_rows(np.unique(ids, axis=0), 4)
    assert id_list(np.unique(ids, axis=0)[rows]) == seeded_order(id_list(np.unique(ids, axis=0)), 4)


def find_sorted(ids: np.ndarray, *query: np.ndarray) -> np.ndarray:
    """What ``IdIndex(ids).find(query)`` gives, from ``match``; ``query`` in blocks."""
    rows = np.full(sum(map(len, query)), -1)

    def take(asked: np.ndarray, found: np.ndarray) -> None:
        assert (rows[asked] == -1).all()
        rows[asked] = found

    match(ids, query, take)
    return rows


def test_half_a_surrogate_pair_is_an_error() -> None:
    with pytest.raises(DataError, match="not valid Unicode"):
        text_id(["bad \ud800"])


def test_seeded_order_depends_on_ids_and_seed_alone() -> None:
    ids = [text_id([str(number)]) for number in range(50)]
    assert seeded_order(ids, 1) == seeded_order(reversed(ids), 1)
    assert seeded_order(ids, 1) != seeded_order(ids, 2) != seeded_order(ids, -2)
    key = (7).to_bytes(8, "little", signed=True)
    assert seeded_order(ids, 7) == sorted(ids, key=lambda one: hashlib.blake2b(one, digest_size=16, key=key).digest())


@given(
    st.lists(st.binary(min_size=16, max_size=16), max_size=30),
    st.lists(st.binary(min_size=16, max_size=16), max_size=10),
    st.data(),
)
def test_index_finds_first_row_or_nothing(ids: list[bytes], others: list[bytes], data: st.DataObject) -> None:
    query = others + (data.draw(st.lists(st.sampled_from(ids))) if ids else [])
    rows = [ids.index(one) if one in ids else -1 for one in query]
    assert IdIndex(id_array(ids)).find(id_array(query)).tolist() == rows
    assert find_sorted(id_array(ids), id_array(query)).tolist() == rows
    assert id_list(id_array(ids)) == ids


def test_index_tells_apart_ids_that_share_half() -> None:
    ids = [b"A" * 8 + bytes([number]) * 8 for number in range(20)]
    query = id_array([*ids[::-1], b"A" * 8 + b"\xff" * 8])
    assert IdIndex(id_array(ids)).find(query).tolist() == [*range(19, -1, -1), -1]
    assert find_sorted(id_array(ids), query).tolist() == [*range(19, -1, -1), -1]


@pytest.mark.parametrize("alike", [0, 5, 7, 8, 15])
def test_index_finds_many_rows_in_blocks_also_where_ids_are_not_hashes(
    alike: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.cache.ids._TOGETHER", 500)
    monkeypatch.setattr("kdcache.cache.ids._BLOCK", 300)
    monkeypatch.setattr("kdcache.cache.ids._QUERIES", 1000)
    ids = np.random.default_rng(alike).integers(0, 256, (4000, 16), np.uint8)
    ids[:, :alike] = 200
    places = np.random.default_rng(1).integers(0, len(ids), 3210)
    first: dict[bytes, int] = {}
    for row, one in enumerate(id_list(ids[:3000])):
        first.setdefault(one, row)
    rows = [first.get(one, -1) for one in id_list(ids[places])]
    assert IdIndex(ids[:3000]).find(ids[places]).tolist() == rows
    assert find_sorted(ids[:3000], ids[places]).tolist() == rows
    for blocks in ([1000, 1000], [999, 1001, 1002], [1, 3000, 1]):  # cut and put together to 1000
        assert find_sorted(ids[:3000], *np.split(ids[places], np.cumsum(blocks))).tolist() == rows


def test_index_refuses_other_arrays() -> None:
    with pytest.raises(ValueError, match="uint8"):
        IdIndex(np.zeros((3, 8), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        find_sorted(np.zeros((3, 8), np.uint8), np.zeros((3, 16), np.uint8))
