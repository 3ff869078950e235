"""``dump-teachers`` with --shard, --engine and --to: what is refused, and what a whole command leaves."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

import pytest

from kdcache.cache.manifest import read_manifest
from kdcache.cache.verify import verify
from kdcache.files import use_disk
from kdcache.testing.faults import UnsyncedDisk
from tests.cli.commands import Said, kdcache
from tests.conftest import TinyRun


@pytest.fixture(autouse=True)
def _fast_disk() -> object:
    with use_disk(UnsyncedDisk()):
        yield


def _dump(run: TinyRun, runs: Path, *arguments: object) -> Said:
    return kdcache(
        "dump-teachers", run.recipe_file, "--output-dir", runs, "--teachers", run.teachers, *arguments
    )  # fmt: skip


def test_shards_through_the_command_line(tiny_run: TinyRun, tmp_path: Path) -> None:
    first = _dump(tiny_run, tmp_path, "--shard", "1/2", "--json")
    assert (first.code, first.document["identity"]) == (0, None)
    assert first.document["missing_parts"] > 0
    assert "ends last publishes" in first.err
    assert not (tmp_path / "reviews" / "run.json").exists()
    last = _dump(tiny_run, tmp_path, "--shard", "0/2")
    assert last.code == 0, last.err
    cache = tmp_path / "reviews" / "cache"
    identity = read_manifest(tiny_run.cache).identity
    assert f"identity {identity}" in last.out
    assert read_manifest(cache).identity == identity
    assert not verify(cache)
    assert json.loads((tmp_path / "reviews" / "run.json").read_text())["stages"].keys() == {"cache"}


def test_a_dump_to_a_remote_through_the_command_line(tiny_run: TinyRun, tmp_path: Path) -> None:
    team = tmp_path / "team"
    team.mkdir()
    said = _dump(tiny_run, tmp_path / "runs", "--to", "reviews", "--remote", team, "--tag", "first")
    assert said.code == 0, said.err
    assert "reviews@1 is on" in said.err
    pulled = kdcache("cache", "pull", "reviews@first", "--remote", team, "--to", tmp_path / "pulled")
    assert pulled.code == 0, pulled.err
    assert read_manifest(tmp_path / "pulled").identity == read_manifest(tiny_run.cache).identity


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--engine", "spark"], "--engine is 'spark'; expected local or ray"),
        (["--shard", "2/2"], "--shard is '2/2'; expected i/n"),
        (["--shard", "0/2", "--repair"], "--repair and --shard"),
        (["--shard", "0/2", "--to", "x"], "--shard and --to"),
        (["--shard", "0/2", "--engine", "ray"], "--shard and --engine ray"),
        (["--repair", "--to", "x"], "--repair and --to"),
        (["--address", "here:1"], "are for Ray"),
        (["--tag", "x"], "for a dump to a remote"),
        (["--engine", "ray", "--address", "nonsense"], "expected HOST:PORT"),
        (["--to", "Not A Name", "--remote", "."], "is not a name for a cache"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_read(
    tiny_run: TinyRun, tmp_path: Path, arguments: list[str], named: str
) -> None:
    said = _dump(tiny_run, tmp_path, *arguments)
    assert said.code == 2, said.err
    assert named in said.err
    assert "hint:" in said.err
    assert not list(tmp_path.rglob("manifest.json"))


def test_without_the_package_the_message_names_it(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = _dump(tiny_run, tmp_path, "--engine", "ray")
    assert said.code == 2
    assert "needs the package ray" in said.err
    assert "pip install 'kdcache[ray]'" in said.err


def test_an_address_that_nobody_answers_is_named_at_once(tiny_run: TinyRun, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers, and nobody else takes it
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        said = _dump(tiny_run, tmp_path, "--engine", "ray", "--address", address)
    assert said.code == 1
    assert f"no Ray cluster answers at '{address}': Connection refused" in said.err
    assert "ray start --head" in said.err
    assert time.monotonic() - began < 60
