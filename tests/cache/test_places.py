"""Millions of ids are joined in temporary files: the same result as in memory, whatever the ids."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache import buckets, places
from kdcache.cache.buckets import match_in_buckets, numbered
from kdcache.cache.ids import id_array, id_list
from kdcache.cache.reader import open_cache
from kdcache.errors import DamageError
from kdcache.runs import home
from kdcache.testing.caches import dump, made_plan


def found_in_buckets(ids: np.ndarray, query: np.ndarray, directory: Path, size: int = 7) -> list[int]:
    """The first row of ``ids`` that has the id of each query, -1: none."""
    rows = np.full(len(query), -1)

    def take(asked: np.ndarray, found: np.ndarray) -> None:
        assert (rows[asked] == -1).all() and (np.diff(asked) > 0).all()
        rows[asked] = found

    def blocks(array: np.ndarray) -> list[np.ndarray]:
        return [array[start : start + size] for start in range(0, len(array), size)]

    match_in_buckets(numbered(blocks(ids)), numbered(blocks(query)), max(len(ids), len(query)), directory, take)
    return rows.tolist()


@given(
    st.lists(st.binary(min_size=16, max_size=16), max_size=40),
    st.lists(st.binary(min_size=16, max_size=16), max_size=10),
    st.sampled_from([1, 3, 1000]),
    st.data(),
)
def test_buckets_find_the_first_row_or_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    ids: list[bytes],
    others: list[bytes],
    rows_of_a_bucket: int,
    data: st.DataObject,
) -> None:
    query = others + (data.draw(st.lists(st.sampled_from(ids))) if ids else [])
    place = tmp_path_factory.getbasetemp() / "buckets"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "_ROWS", rows_of_a_bucket)
        found = found_in_buckets(id_array(ids), id_array(query), place)
    assert found == [ids.index(one) if one in ids else -1 for one in query]
    assert not any(place.iterdir()), "the files have no names"


@pytest.mark.parametrize("alike", [0, 1, 2, 9, 15])
def test_buckets_also_hold_ids_that_are_no_hashes(alike: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_ROWS", 100)
    ids = np.random.default_rng(alike).integers(0, 256, (3000, 16), np.uint8)
    ids[:, :alike] = 200
    asked = np.random.default_rng(1).integers(0, len(ids), 2000)
    first: dict[bytes, int] = {}
    for row, one in enumerate(id_list(ids[:2500])):
        first.setdefault(one, row)
    assert found_in_buckets(ids[:2500], ids[asked], tmp_path, 300) == [
        first.get(one, -1) for one in id_list(ids[asked])
    ]


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A cache whose test texts are in train too, so that they lie in two parts; and ids, some of which it lacks."""
    path = tmp_path / "cache"
    plan = made_plan(25, 9, ["bert"])
    dump(path, plan)
    grown = made_plan(25, 9, ["bert"])
    some = list(plan.test.items())[:4]
    dump(path, type(plan)(plan.train | dict(some), grown.test, plan.teachers))
    cache = open_cache(path)
    known = np.concatenate([cache.text_ids(part.name) for part in cache.parts])
    absent = np.random.default_rng(0).integers(0, 256, (5, 16), np.uint8)
    ids = np.concatenate([known, absent, known[::3]])
    return path, ids[np.random.default_rng(1).permutation(len(ids))]


@pytest.mark.parametrize("rows_of_a_bucket", [5, 10**6])
def test_places_are_those_of_a_search_in_memory(
    texts: tuple[Path, np.ndarray], rows_of_a_bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ids = texts
    wanted = open_cache(path).locate(ids)
    assert (wanted[0] < 0).sum() == 5 and len({part.scope for part in open_cache(path).parts}) == 2
    monkeypatch.setattr(buckets, "LARGE", 3)
    monkeypatch.setattr(buckets, "_ROWS", rows_of_a_bucket)
    monkeypatch.setattr(places, "_BLOCK", 7)
    monkeypatch.setattr(places.TextPlaces, "_in_memory", None)
    for found, want in zip(open_cache(path).locate(ids), wanted, strict=True):
        assert found.dtype == want.dtype == np.int32 and np.array_equal(found, want)


@pytest.mark.parametrize("failing", ["write", "read", "directory"])
def test_without_room_for_temporary_files_ids_are_joined_in_memory(
    failing: str,
    texts: tuple[Path, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, ids = texts
    wanted = open_cache(path).locate(ids)
    monkeypatch.setattr(buckets, "LARGE", 3)
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    if failing == "directory":
        (tmp_path / "home").write_bytes(b"a file")
    elif failing == "read":
        monkeypatch.setattr(os, "preadv", lambda *_: 0)
    else:
        real = buckets.tempfile.TemporaryFile

        def full(**arguments: object) -> object:
            file = real(**arguments)  # type: ignore[call-overload]
            descriptor = os.open("/dev/full", os.O_RDWR)
            os.dup2(descriptor, file.fileno())
            os.close(descriptor)
            return file

        monkeypatch.setattr(buckets.tempfile, "TemporaryFile", full)
    found = open_cache(path).locate(ids)
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert "joined in memory" in caplog.text


@pytest.mark.parametrize("failing", ["known", "query"])
def test_an_error_on_one_side_ends_the_other(failing: str, tmp_path: Path) -> None:
    """Also an interrupt: without this, dividing 10^8 ids would go on for seconds."""
    taken, waiting = [], threading.Event()

    def endless() -> Iterator[np.ndarray]:
        for number in range(10_000):
            taken.append(number)
            waiting.set()
            yield np.zeros((10, 16), np.uint8)

    def broken() -> Iterator[np.ndarray]:
        waiting.wait()
        raise DamageError("a part", "a cure")
        yield  # a generator

    sides = [numbered(broken()), numbered(endless())]
    with pytest.raises(DamageError, match="a part"):
        match_in_buckets(*(sides if failing == "known" else sides[::-1]), 10, tmp_path, lambda *_: None)
    assert 0 < len(taken) < 10_000


def test_examples_of_a_mapped_file_are_those_that_are_read(
    texts: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = texts
    monkeypatch.setattr("kdcache.cache.tables.BLOCK", 4)
    cache = open_cache(path)
    for split in cache.splits:
        plain = cache.examples(split)
        blocks = list(cache.example_ids(split))
        assert np.array_equal(np.concatenate(blocks), plain.text_ids) and max(map(len, blocks)) == 4
        assert np.array_equal(cache.example_labels(split), plain.labels)
        assert cache.example_labels(split).dtype == np.int8
        assert cache.example_count(split) == len(plain)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "another label"])
def test_a_mapped_file_is_checked_before_it_is_used(damage: str, texts: tuple[Path, np.ndarray]) -> None:
    path, _ = texts
    cache = open_cache(path)
    file = path / cache.manifest.contents.splits["train"].file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data[:-1] if damage == "truncated" else data)
    if damage == "another label":
        file.write_bytes(data)
        monkeyed = open_cache(path)
        with pytest.raises(DamageError, match="train"):
            monkeyed.example_labels("train")
        return
    with pytest.raises(DamageError, match="train"):
        list(cache.example_ids("train"))


def test_nothing_lies_in_the_home_directory_afterwards(
    texts: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(buckets, "LARGE", 3)
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    open_cache(texts[0]).locate(texts[1])
    assert (home() / "joins").is_dir() and not list((home() / "joins").iterdir())
