"""What the commands say of a cache that is only partly here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kdcache.cache.reader import open_cache
from kdcache.cache.selection import Selection, write_selection
from kdcache.testing.caches import dump, made_plan
from tests.cli.commands import kdcache


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """Layer 2 of bert from a cache of two teachers, without the texts."""
    path = tmp_path / "part"
    dump(path, made_plan())
    selection = Selection({"bert": (2,)}, text=False)
    contents = open_cache(path).manifest.contents
    for name in contents.files.keys() - selection.covers(contents):
        (path / name).unlink()
    write_selection(path, selection, origin="made-up@1")
    return path


def test_info_says_what_is_here_and_what_is_not(part: Path) -> None:
    document = kdcache("cache", "info", part, "--json").document
    selection = document["selection"]
    assert {key: selection[key] for key in ("teachers", "text", "complete", "origin")} == {
        "teachers": ["bert"], "text": False, "complete": True, "origin": "made-up@1",
    }  # fmt: skip
    assert selection["bytes_here"] + selection["bytes_not_selected"] == document["bytes"]
    assert {name: one["here"] for name, one in document["teachers"]["bert"]["layers"].items()} == {
        "2": True,
        "4": False,
    }
    assert not document["teachers"]["roberta"]["here"]
    shown = kdcache("cache", "info", part).out
    assert "pulled_from" in shown and "made-up@1" in shown and "not pulled" in shown


def test_verify_tells_damage_from_what_is_still_to_come(part: Path) -> None:
    said = kdcache("cache", "verify", part)
    assert said.code == 0 and "every selected file" in said.out
    shutil.rmtree(part / "teachers/bert/outputs")
    assert kdcache("cache", "verify", part).code == 3
    write_selection(part, Selection({"bert": (2,)}, text=False), complete=False, origin="made-up@1")
    said = kdcache("cache", "verify", part)
    assert said.code == 0 and "not complete: 5 selected files were not fetched yet" in said.out
    assert len(kdcache("cache", "verify", part, "--json").document["to_come"]) == 5
    assert kdcache("cache", "info", part, "--json").document["selection"]["complete"] is False


def test_names_from_somebody_else_do_not_steer_the_terminal(tmp_path: Path) -> None:
    plan = made_plan(3, 1, ("bert",))
    dump(tmp_path / "c", plan, provenance={"command": "x\x1b]0;owned\x07\x9b31m\u202egnp.exe", "score": "\ud7ff"})
    said = kdcache("cache", "info", tmp_path / "c")
    assert said.code == 0 and "\\u001b]0;owned\\u0007\\u009b31m\\u202egnp.exe" in said.out
    assert kdcache("cache", "info", tmp_path / "c", "--json").document["provenance"]["command"].startswith("x\x1b]")


def test_folders_of_the_machine_of_the_dump_are_left_out_for_people(tmp_path: Path) -> None:
    command = (
        "kdcache run /home/ada/films/sst2.toml --set 'data.train=\"/data/in/train.tsv\"' "
        "--remote s3://team/kd/x -o runs/a"
    )
    dump(tmp_path / "c", made_plan(3, 1, ("bert",)), provenance={"command": command})
    shown = "kdcache run …/sst2.toml --set 'data.train=\"…/train.tsv\"' --remote s3://team/kd/x -o runs/a"
    assert shown in kdcache("cache", "info", tmp_path / "c").out
    assert kdcache("cache", "info", tmp_path / "c", "--json").document["provenance"]["command"] == command
