"""Kept student tokens and alignments: found again, never for something else, and never worse than making them anew."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from kdcache.cache.ids import id_array, text_id
from kdcache.data.encoding import encode
from kdcache.loading import alignment as align_store
from kdcache.loading.alignment import StudentTokens, load_arrays, save_arrays, student_tokens
from kdcache.runs import home
from kdcache.testing import tiny

TEXTS = [("the film is crème",), ("a dull plot 🙂",), ("never",)]
IDS = id_array([text_id(text) for text in TEXTS])


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path))


def kept() -> list[Path]:
    return sorted(home().rglob("*.bin"))


def refuse() -> list[tuple[str, ...]]:
    raise AssertionError("the texts were asked for although their tokens are kept")


def test_what_was_made_is_found_again() -> None:
    tokenizer = tiny.wordpiece_tokenizer()
    made = StudentTokens(tokenizer, 16).encoded(IDS, lambda: TEXTS)
    again = StudentTokens(tokenizer, 16).encoded(IDS, refuse)
    for name, array in vars(made).items():
        assert np.array_equal(array, getattr(again, name)), name
        assert array.dtype == getattr(again, name).dtype
    teacher = student_tokens(encode(tiny.bytelevel_tokenizer(), TEXTS, 16))
    aligned = StudentTokens(tokenizer, 16).aligned(IDS, made, teacher)
    count = len(kept())
    repeated = StudentTokens(tokenizer, 16).aligned(IDS, made, teacher)
    assert len(kept()) == count == 2
    assert np.array_equal(aligned.first, repeated.first)
    assert np.array_equal(aligned.src, repeated.src)
    assert np.array_equal(aligned.weight, repeated.weight)
    assert aligned.tokens == repeated.tokens


def test_0_1_0_finds_nothing_that_it_cannot_read() -> None:
    """Both versions may share a directory; 0.1.0 reads every ``tokens-`` file and fails on arrays it does not know."""
    StudentTokens(tiny.wordpiece_tokenizer(), 16).encoded(IDS, lambda: TEXTS)
    assert [path.name.split("-")[0] for path in kept()] == ["texts"]


def test_a_tokenizer_without_types_is_kept_without_them() -> None:
    student = StudentTokens(tiny.bytelevel_tokenizer(), 16)
    assert student.encoded(IDS, lambda: TEXTS).token_type_ids is None
    assert student.encoded(IDS, refuse).token_type_ids is None


def test_anything_else_is_something_else() -> None:
    uncased, cased = tiny.wordpiece_tokenizer(), tiny.wordpiece_tokenizer(lowercase=False)
    teacher = student_tokens(encode(tiny.bytelevel_tokenizer(), TEXTS, 16))
    shorter = student_tokens(encode(tiny.bytelevel_tokenizer(), TEXTS, 5))
    encoded = StudentTokens(uncased, 16).encoded(IDS, lambda: TEXTS)
    StudentTokens(uncased, 16).aligned(IDS, encoded, teacher)
    for number, make in enumerate(
        [
            lambda: StudentTokens(uncased, 8).encoded(IDS, lambda: TEXTS),
            lambda: StudentTokens(cased, 16).encoded(IDS, lambda: TEXTS),
            lambda: StudentTokens(uncased, 16).encoded(IDS[:2], lambda: TEXTS[:2]),
            lambda: StudentTokens(uncased, 16).aligned(IDS, encoded, shorter),
            lambda: StudentTokens(uncased, 16).aligned(IDS[::-1], encoded, teacher),
        ],
        start=3,
    ):
        make()
        assert len(kept()) == number


@pytest.mark.parametrize(
    "damage",
    [
        lambda _data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"{}\n" + data,
        lambda data: b"[1]\n" + data,
        lambda data: data.replace(b'"<i8"', b'"|O8"', 1),
        lambda data: data.replace(b'"offsets"', b'"offset5"', 1),
    ],
)
def test_a_damaged_file_is_made_again(damage: object) -> None:
    student = StudentTokens(tiny.wordpiece_tokenizer(), 16)
    made = student.encoded(IDS, lambda: TEXTS)
    (path,) = kept()
    sound = path.read_bytes()
    path.write_bytes(damage(sound))  # type: ignore[operator]
    again = student.encoded(IDS, lambda: TEXTS)
    assert np.array_equal(again.input_ids, made.input_ids)
    assert path.read_bytes() == sound


def test_a_disk_that_takes_nothing_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(align_store, "_told", [])
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "replace", Mock(side_effect=full))
    student = StudentTokens(tiny.wordpiece_tokenizer(), 16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert len(student.encoded(IDS, lambda: TEXTS)) == 3
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert not [path for path in home().rglob("*") if path.is_file()], "nothing half-written is left behind"


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    arrays = {
        "empty": np.zeros(0, np.int64),
        "odd": np.arange(3, dtype=np.int8),
        "float": np.array([1.5, np.nan], np.float32),
    }
    save_arrays(tmp_path / "a" / "b.bin", arrays)
    found = load_arrays(tmp_path / "a" / "b.bin", {"odd"})
    assert found is not None
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    assert load_arrays(tmp_path / "a" / "b.bin", {"other"}) is None
    assert load_arrays(tmp_path / "absent.bin", set()) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "09"),
        ("dtype", "O"),
        ("dtype", "<f4,<i8"),
        ("dtype", "(2,)<i4"),
        ("length", -1),
        ("length", 2**70),
        ("length", 2),
    ],
)
def test_a_first_line_that_says_anything_is_made_again(tmp_path: Path, field: str, value: object) -> None:
    """Numpy takes programs and structures for names of types.

    A file that was forged, or written by a newer version, has any.
    """
    path = tmp_path / "x.bin"
    save_arrays(path, {"a": np.arange(3)})
    head, _, body = path.read_bytes().partition(b"\n")
    header = json.loads(head)
    header["arrays"]["a"][0 if field == "dtype" else 1] = value
    path.write_bytes(json.dumps(header).encode() + b"\n" + body)
    assert load_arrays(path, {"a"}) is None
