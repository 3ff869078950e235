"""Kept joins of millions of examples: the same as in memory, and made anew when anything changes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache import kept
from kdcache.cache import buckets, places
from kdcache.cache.ids import Examples, id_array
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.writer import open_writer
from kdcache.errors import DamageError, MismatchError
from kdcache.loading import examples as joins
from kdcache.loading.cached import loader
from kdcache.loading.examples import JoinedExamples, join_examples
from kdcache.runs import home
from kdcache.testing import tiny
from kdcache.testing.caches import Plan, dump, dump_teacher, made_plan, made_teacher, made_texts
from tests.conftest import TinyRun


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kept, "_told", [])


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, every split is a large one, cut into small blocks."""

    def from_here() -> None:
        monkeypatch.setattr(buckets, "LARGE", 2)
        monkeypatch.setattr(buckets, "_ROWS", 4)
        monkeypatch.setattr(places, "_BLOCK", 5)
        monkeypatch.setattr("kdcache.cache.tables.BLOCK", 4)
        monkeypatch.setattr("kdcache.loading.order._ROWS_AT_ONCE", 3)

    return from_here


def dumped(path: Path, plan: Plan, labels: int = 3, transfer: int = 6, full_transfer: int = 3) -> Cache:
    """A cache with transfer texts, some of them with logits only; examples share texts and have no order."""
    with open_writer(path, plan.task, plan.settings) as writer:
        others = list(made_texts(transfer, "other").items())
        writer.add_texts(plan.train | dict(others[:full_transfer]), plan.test, dict(others[full_transfer:]))
        for spec in plan.teachers:
            dump_teacher(writer, spec)
        for split, texts in (("train", plan.train), ("test", plan.test), ("transfer", dict(others))):
            ids = id_array(texts)
            rows = np.random.default_rng(0).integers(0, len(ids), 2 * len(ids) + 1)
            given = np.full(len(rows), -1) if split == "transfer" else rows % labels - 1
            writer.write_examples(split, ids[rows], given, None)
        writer.publish({}, card=lambda _: "")
    return open_cache(path)


def same(one: JoinedExamples, other: JoinedExamples) -> bool:
    assert np.array_equal(one.parts, other.parts) and one.parts.dtype == other.parts.dtype == np.int32
    assert np.array_equal(one.rows[:], other.rows[:]) and np.array_equal(one.labels[:], other.labels[:])
    assert np.array_equal(one.text_ids[:], other.text_ids[:]) and one.skipped == other.skipped
    assert (one.logits_only is None) == (other.logits_only is None)
    assert one.logits_only is None or np.array_equal(one.logits_only, other.logits_only)  # type: ignore[arg-type]
    return True


def files() -> list[Path]:
    return sorted((home() / "joins").glob("*.bin"))


def refuse(*_: Any) -> Any:
    raise AssertionError("joined again although the join is kept")


def own_examples(cache: Cache, changed: int = 0) -> Callable[[str], Examples]:
    """The cache's examples as those of data files, with another label in row ``changed - 1``."""

    def of(split: str) -> Examples:
        table = cache.examples(split)
        labels = table.labels.copy()
        labels[: changed and changed] = 1
        return replace(table, labels=labels)

    return of


CHOICES = [
    (splits, {"hidden": hidden, "logits": logits})
    for splits, hidden, logits in itertools.product(
        [("train",), ("train", "transfer"), ("test",)], [False, True], [False, True]
    )
    if not (splits == ("test",) and hidden)
]


@pytest.mark.parametrize("of_files", [False, True])
def test_a_kept_join_is_the_one_in_memory(
    of_files: bool, tmp_path: Path, large: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = dumped(tmp_path / "cache", made_plan(11, 5, ["bert"]))
    given = own_examples(cache) if of_files else None
    wanted = [join_examples(cache, given, splits, **choice) for splits, choice in CHOICES]  # type: ignore[arg-type]
    assert not home().exists(), "small caches write nothing"
    assert any(one.logits_only is not None for one in wanted)
    large()
    for turn in range(2):
        kept._found_whole.clear()
        if turn:  # a later process neither reads examples nor joins
            monkeypatch.setattr(joins, "_join", refuse)
            monkeypatch.setattr(places.TextPlaces, "locate_blocks", refuse)
        for (splits, choice), want in zip(CHOICES, wanted, strict=True):
            assert same(join_examples(open_cache(cache.path), given, splits, **choice), want)  # type: ignore[arg-type]
    assert len(files()) == len(CHOICES)


def test_what_a_join_depends_on_makes_it_another(tmp_path: Path, large: Callable[[], None]) -> None:
    plan = made_plan(11, 5, ["bert"])
    cache = dumped(tmp_path / "cache", plan)
    large()
    join_examples(cache, None, ("train",))
    for number, make in enumerate(
        [
            lambda: join_examples(cache, None, ("train",), hidden=True),
            lambda: join_examples(cache, None, ("train",), logits=False),
            lambda: join_examples(cache, None, ("train",), missing="skip"),
            lambda: join_examples(cache, None, ("test",)),
            lambda: join_examples(cache, None, ("train", "test")),
            lambda: join_examples(cache, None, ("test", "train")),
            lambda: join_examples(cache, own_examples(cache), ("train",)),
            lambda: join_examples(cache, own_examples(cache, 1), ("train",)),
            lambda: join_examples(dumped(tmp_path / "labels", plan, labels=2), None, ("train",)),
            lambda: join_examples(dumped(tmp_path / "texts", made_plan(12, 5, ["bert"])), None, ("test",)),
        ],
        start=2,
    ):
        make()
        assert len(files()) == number
    join_examples(dumped(tmp_path / "copy", plan), None, ("train",))
    dump(cache.path, Plan(plan.train, plan.test, (*plan.teachers, made_teacher("roberta"))))
    assert len(files()) == 11, "another copy of the cache, and another teacher, change no place of a text"


@pytest.mark.parametrize("changed", ["labels", "texts"])
def test_a_cache_that_grew_is_joined_again(changed: str, tmp_path: Path, large: Callable[[], None]) -> None:
    """The version that was joined before and the new one lie at the same path."""
    plan = made_plan(11, 5, ["bert"])
    large()
    before = join_examples(dumped(tmp_path / "cache", plan), None, ("train",))
    labels, parts = before.labels[:].tolist(), len(open_cache(tmp_path / "cache").parts)
    if changed == "labels":
        now = dumped(tmp_path / "cache", plan, labels=2)
    else:
        now = dumped(tmp_path / "cache", Plan(made_texts(3, "new") | plan.train, plan.test, plan.teachers))
        assert len(now.parts) > parts
    found = join_examples(now, None, ("train",))
    table = now.examples("train")
    assert found.labels[:].tolist() == table.labels.tolist() != labels
    assert np.array_equal(found.text_ids[:], table.text_ids)
    assert before.labels[:].tolist() == labels, "the arrays of the version before stay as they were"


def test_missing_texts_are_counted_and_named_as_in_memory(tmp_path: Path, large: Callable[[], None]) -> None:
    cache = dumped(tmp_path / "cache", made_plan(11, 5, ["bert"]))
    table = cache.examples("train")
    ids = np.concatenate([table.text_ids[:6], id_array([b"x" * 16, b"y" * 16]), table.text_ids[6:]])
    foreign = Examples(ids, np.arange(len(ids)) % 3 - 1, None)
    test = cache.examples("test")

    def errors() -> Iterator[str]:
        for examples, hidden in ((foreign, False), (test, True)):
            with pytest.raises(MismatchError) as refused:
                join_examples(cache, lambda _, one=examples: one, ("train",), hidden=hidden)  # type: ignore[misc]
            yield refused.value.message
        with pytest.raises(MismatchError) as refused:
            join_examples(cache, lambda _: Examples(ids[6:8], np.zeros(2, int), None), ("train",), missing="skip")
        yield refused.value.message

    wanted = [*errors(), join_examples(cache, lambda _: foreign, ("train",), missing="skip")]
    large()
    found = [*errors(), join_examples(cache, lambda _: foreign, ("train",), missing="skip")]
    assert found[:3] == wanted[:3] and "lacks 2 of the" in str(wanted[0])
    assert same(found[3], wanted[3]) and wanted[3].skipped == 2  # type: ignore[arg-type, union-attr]
    with pytest.raises(MismatchError, match="no split 'dev'"):
        join_examples(cache, None, ("dev",))


def test_a_damaged_join_is_made_anew(tmp_path: Path, large: Callable[[], None]) -> None:
    cache = dumped(tmp_path / "cache", made_plan(11, 5, ["bert"]))
    large()
    wanted = join_examples(cache, None, ("train",))
    (file,) = files()
    sound = file.read_bytes()
    for data in (sound[:100], b"", sound[:70] + bytes([sound[70] ^ 1]) + sound[71:]):
        file.unlink()
        file.write_bytes(data)
        kept._found_whole.clear()
        assert same(join_examples(open_cache(cache.path), None, ("train",)), wanted)
        assert file.read_bytes() == sound


def test_without_a_home_directory_everything_is_as_before(
    tmp_path: Path, large: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = dumped(tmp_path / "cache", made_plan(11, 5, ["bert"]))
    wanted = join_examples(cache, None, ("train", "transfer"))
    large()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "file"))
    assert same(join_examples(open_cache(cache.path), None, ("train", "transfer")), wanted)


def test_damage_of_the_cache_is_found_while_joining(tmp_path: Path, large: Callable[[], None]) -> None:
    large()
    for number, file in enumerate(["texts/part-00001.arrow", "data/train"]):
        cache = dumped(tmp_path / str(number), made_plan(11, 5, ["bert"]))
        (victim,) = cache.path.glob(f"{file}*")
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
        with pytest.raises(DamageError, match=file):
            join_examples(cache, None, ("train",))
        assert not files()


def test_batches_are_the_same_with_a_kept_join(tiny_run: TinyRun, large: Callable[[], None]) -> None:
    """Through the whole loader: first the plain one, then one that makes the join, then one that maps it."""

    def rows() -> list[tuple[Any, ...]]:
        source = loader(tiny_run.cache, tiny.wordpiece_tokenizer(), student_layers=2, batch_size=16, window=2)
        return [
            (batch.text_ids.tolist(), batch.labels.tolist(), batch.targets.logits.tolist())  # type: ignore[union-attr]
            for batch in source.batches(1)
        ]

    plain = rows()
    large()
    assert rows() == rows() == plain
    assert len(files()) == 1


PROCESS = """
import sys
from pathlib import Path
from kdcache.cache import buckets
from kdcache.loading import examples
from kdcache.cache.reader import open_cache
buckets.LARGE = 2
real = examples._join
def told(*a, **k):
    print("joined", flush=True)
    return real(*a, **k)
examples._join = told
joined = examples.join_examples(open_cache(Path(sys.argv[1])), None, ("train", "transfer"), hidden=True)
print(joined.parts.tolist(), joined.rows[:].tolist(), joined.labels[:].tolist())
"""


def test_processes_that_open_together_join_once(tmp_path: Path) -> None:
    cache = dumped(tmp_path / "cache", made_plan(11, 5, ["bert"]))
    wanted = join_examples(cache, None, ("train", "transfer"), hidden=True)
    command = [sys.executable, "-c", PROCESS, str(cache.path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    printed = [process.communicate()[0].splitlines() for process in processes]
    assert sum(line == "joined" for lines in printed for line in lines) == 1
    shown = f"{wanted.parts.tolist()} {wanted.rows[:].tolist()} {wanted.labels[:].tolist()}"
    assert [lines[-1] for lines in printed] == [shown, shown]
