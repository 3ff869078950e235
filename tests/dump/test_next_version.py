"""Two colleagues extend one name at once: both teachers are in the newest version, and no teacher runs twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from kdcache.cache.manifest import read_manifest
from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify
from kdcache.dump.extend import ExtendReport, Wanted
from kdcache.dump.next_version import extend_version
from kdcache.errors import RemoteError
from kdcache.progress import SilentProgress
from kdcache.share.local_store import LocalStore
from kdcache.share.push import push
from kdcache.share.refs import history, resolve
from kdcache.share.stores.base import Remote
from kdcache.testing.memory_remote import MemoryRemote
from kdcache.testing.tiny import reviews, write_reviews
from tests.dump.conftest import Workbench
from tests.share.worlds import Watched

TOKENS = "dump.tokens_per_batch=4096"
REF = "refs/reviews/2"
Passes = Counter[tuple[str, tuple[int, ...]]]


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, line: str) -> None:
        self.said.append(line)


class Team:
    """A remote with version 1, which has bert alone; each colleague has a machine and a store of its own."""

    def __init__(self, bench: Workbench, base: Path, root: Path, *, conditional: bool = True) -> None:
        self.bench, self.root, self.remote = bench, root, MemoryRemote(conditional=conditional)
        self.notes = Notes()
        push(self.remote, base, "reviews")

    def extend(
        self, who: str, *teachers: str, remote: Remote | None = None, **options: object
    ) -> tuple[ExtendReport, str]:
        place = remote or cast("Remote", self.remote)
        wanted = Wanted(dict.fromkeys(teachers, self.bench.teachers), **options)  # type: ignore[arg-type]
        store = LocalStore(self.root / who)
        return extend_version(
            place, resolve(place, "reviews@1" if remote else "reviews"), wanted, store=store, progress=self.notes
        )

    def meanwhile(self, action: Callable[[], object], request: tuple[str, str] = ("create", REF)) -> Remote:
        """The remote, on which ``action`` happens just before the first such request."""
        done: list[bool] = []

        def hear(method: str, key: str) -> None:
            if method == request[0] and key.startswith(request[1]) and not done:
                done.append(True)
                action()

        return cast("Remote", Watched(self.remote, hear))

    def fail_to_push(self, who: str, teacher: str) -> None:
        """The teacher runs, and then the remote is gone."""

        def fail() -> None:
            raise RemoteError("the cable")

        with pytest.raises(RemoteError):
            self.extend(who, teacher, remote=self.meanwhile(fail, ("list", "files/")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, review_recipe: Path, tiny_teachers: Path) -> Path:
    bench = Workbench(review_recipe, tiny_teachers, tmp_path_factory.mktemp("base") / "cache")
    bench.only("bert").dump(TOKENS)
    return bench.cache


@pytest.fixture(scope="module")
def all_three(tmp_path_factory: pytest.TempPathFactory, review_recipe: Path, tiny_teachers: Path) -> str:
    bench = Workbench(review_recipe, tiny_teachers, tmp_path_factory.mktemp("all") / "cache")
    return bench.dump(TOKENS).identity


def texts(passes: Passes) -> dict[str, int]:
    """Texts that went through each teacher: the sample of its bases, 64 texts, and then all."""
    total: Counter[str] = Counter()
    for (name, _), count in passes.items():
        total[name] += count
    return dict(total)


def test_who_loses_the_number_comes_on_top(
    bench: Workbench, base: Path, all_three: str, tmp_path: Path, forward_passes: Passes
) -> None:
    team = Team(bench, base, tmp_path)
    slow = team.meanwhile(lambda: team.extend("ben", "roberta"))
    report, reference = team.extend("ada", "xlm", remote=slow)
    assert reference == "reviews@3" and report.identity == all_three
    assert resolve(team.remote, "reviews").identity == all_three
    assert [sorted(open_manifest(team, number)) for number in (1, 2)] == [["bert"], ["bert", "roberta"]]
    assert texts(forward_passes) == {"roberta": 64 + 184, "xlm": 64 + 184}
    assert verify(report.cache) == [] and not list((tmp_path / "ada/extending").iterdir())
    assert [run.teacher for run in report.runs] == ["xlm"] and report.bytes_new < report.bytes_shared + report.bytes_new
    record = read_manifest(report.cache).provenance["teachers"]
    assert record["roberta"]["texts_run"] == record["xlm"]["texts_run"] == 184
    assert any("reviews@2 was published meanwhile" in line for line in team.notes.said)


def test_rows_that_were_added_meanwhile_are_all_that_runs_again(
    bench: Workbench, base: Path, tmp_path: Path, forward_passes: Passes
) -> None:
    team = Team(bench, base, tmp_path)
    more = write_reviews(
        tmp_path / "more.tsv", [*reviews(184, seed=1)[:96], ("one line more", 1), ("and another one", 0)]
    )
    recipe = bench.only("bert").recipe(f'data.train="{more}"', TOKENS)
    slow = team.meanwhile(lambda: team.extend("ben", "bert", recipe=recipe), ("write", "manifests/"))
    report, reference = team.extend("ada", "xlm", remote=slow)
    assert reference == "reviews@3" and texts(forward_passes) == {"bert": 2, "xlm": 64 + 184 + 2}
    assert [run.texts for run in report.runs] == [184, 2]
    cache = open_cache(report.cache, incomplete=True)
    assert set(cache.teachers) == {"bert", "xlm"} and len(cache.examples("train").labels) == 98
    assert verify(report.cache) == []


def test_what_an_interrupted_command_ran_is_kept_for_another_version(
    bench: Workbench, base: Path, all_three: str, tmp_path: Path, forward_passes: Passes
) -> None:
    team = Team(bench, base, tmp_path)
    team.fail_to_push("ada", "xlm")
    team.extend("ben", "roberta")
    report, reference = team.extend("ada", "xlm")
    assert reference == "reviews@3" and report.identity == all_three and not report.runs
    assert texts(forward_passes) == {"roberta": 64 + 184, "xlm": 64 + 184}
    assert not list((tmp_path / "ada/extending").iterdir())
    assert read_manifest(report.cache).provenance["teachers"]["xlm"]["texts_run"] == 184


def test_what_an_interrupted_command_ran_is_not_published_by_another(
    bench: Workbench, base: Path, all_three: str, tmp_path: Path, forward_passes: Passes
) -> None:
    team = Team(bench, base, tmp_path)
    team.fail_to_push("ada", "xlm")
    (left,) = (tmp_path / "ada/extending").iterdir()
    left.rename(left.with_name(left.name.rpartition("-")[0]))  # as 0.1.0 named it
    _, reference = team.extend("ada", "roberta")
    assert reference == "reviews@2" and set(open_manifest(team, 2)) == {"bert", "roberta"}
    report, reference = team.extend("ada", "xlm")
    assert reference == "reviews@3" and report.identity == all_three and not report.runs
    assert texts(forward_passes) == {"roberta": 64 + 184, "xlm": 64 + 184}


def test_the_same_command_again_ends_and_makes_no_version(
    bench: Workbench, base: Path, tmp_path: Path, forward_passes: Passes
) -> None:
    team = Team(bench, base, tmp_path)
    first, reference = team.extend("ada", "xlm")
    again, same = team.extend("ada", "xlm")
    assert (reference, same) == ("reviews@2", "reviews@2") and again.identity == first.identity
    assert not again.runs and again.cache == first.cache and verify(again.cache) == []
    assert texts(forward_passes) == {"xlm": 64 + 184}


def test_others_who_never_stop_end_in_an_error_that_loses_nothing(
    bench: Workbench, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward_passes: Passes
) -> None:
    team = Team(bench, base, tmp_path)
    monkeypatch.setattr("kdcache.dump.next_version.ROUNDS", 2)
    bench.only("bert").dump(TOKENS)
    other = tmp_path / "other"
    bench.only("bert", "roberta").dump(TOKENS, cache=other)
    turns = iter([other, bench.cache, other, bench.cache])
    busy = cast("Remote", Watched(team.remote, lambda method, key: (
        push(team.remote, next(turns), "reviews") if method == "create" and key.startswith("refs/") else None
    )))  # fmt: skip
    with pytest.raises(RemoteError, match="others published 2 versions"):
        team.extend("ada", "xlm", remote=busy)
    forward_passes.clear()
    report, reference = team.extend("ada", "xlm")
    assert (
        reference == "reviews@4"
        and not forward_passes
        and set(open_cache(report.cache, incomplete=True).teachers) >= {"xlm"}
    )


def test_on_a_store_that_decides_nothing_a_fork_is_said_and_closed(
    bench: Workbench, base: Path, all_three: str, tmp_path: Path, forward_passes: Passes
) -> None:
    team = Team(bench, base, tmp_path, conditional=False)
    slow = team.meanwhile(lambda: team.extend("ben", "roberta"), ("create", "refs/reviews/2-"))
    report, reference = team.extend("ada", "xlm", remote=slow)
    assert [ref.number for ref in history(team.remote, "reviews")] == [1, 2, 2, 3]
    assert reference == "reviews@3" and resolve(team.remote, "reviews").identity == report.identity == all_three
    assert texts(forward_passes) == {"roberta": 64 + 184, "xlm": 64 + 184}
    assert any("two writers published reviews@2 at once" in line for line in team.notes.said)


def open_manifest(team: Team, number: int) -> dict[str, object]:
    from kdcache.share.pull import fetch_manifest

    return dict(fetch_manifest(team.remote, resolve(team.remote, f"reviews@{number}")).contents.teachers)
