"""The commands of sharing, through the real command line, on a directory as remote."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.cache.manifest import read_manifest
from kdcache.cache.verify import verify
from kdcache.share import keys as layout
from kdcache.testing.faults import delete, flip_bit
from tests.cli.commands import kdcache

Caches = dict[str, Path]


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """KDCACHE_REMOTE is a directory; the working directory is empty."""
    (tmp_path / "team").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("KDCACHE_REMOTE", str(tmp_path / "team"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "team"


def test_a_cache_goes_to_a_colleague(team: Path, caches: Caches) -> None:
    said = kdcache("cache", "push", caches["two"], "--name", "sst2", "--dry-run")
    assert said.code == 0 and "sst2@1" in said.out and "would be sent" in said.out
    assert not (team / "refs").exists()
    said = kdcache("cache", "push", caches["two"], "--name", "sst2", "--tag", "v1", "--json")
    assert said.code == 0 and said.document["reference"] == "sst2@1" and said.document["new_version"]
    assert "push sst2" in said.err
    assert "was this cache already: 0 of" in kdcache("cache", "push", caches["two"], "--name", "sst2").out
    listed = kdcache("cache", "ls", "--remote")
    assert "sst2@1" in listed.out and "v1" in listed.out and read_manifest(caches["two"]).identity[:12] in listed.out
    info = kdcache("cache", "info", "sst2@v1", "--json").document
    assert info["reference"] == "sst2@1" and set(info["teachers"]) == {"bert", "roberta"}
    assert kdcache("cache", "info", "sst2").out.startswith("reference")
    said = kdcache("cache", "pull", "sst2")
    assert said.code == 0 and "sst2@1 is in sst2:" in said.out
    assert verify(Path("sst2")) == []
    assert kdcache("cache", "ls", "--json").document["caches"][0]["path"] == "sst2"
    assert "identity" in kdcache("cache", "ls").out


@pytest.mark.usefixtures("team")
def test_a_part_is_pulled_shown_and_completed(caches: Caches) -> None:
    kdcache("cache", "push", caches["two"], "--name", "sst2")
    said = kdcache(
        "cache", "pull", "sst2", "--teachers", "bert", "--layers", "4", "--no-text", "--to", "part", "--json"
    )
    assert said.document["selection"] == {"teachers": {"bert": [4]}, "text": False}
    assert "of" in kdcache("cache", "ls").out
    standing = kdcache("cache", "status", "part")
    assert "as sst2@1" in standing.out and "not pulled:" in standing.out
    assert kdcache("cache", "pull", "sst2", "--teachers", "gpt", "--to", "x").code == 4
    assert kdcache("cache", "pull", "sst2", "--layers", "4,x", "--to", "x").code == 2
    assert not Path("x").exists()
    again = kdcache("cache", "pull", "sst2", "--to", "part", "--json").document
    assert again["selection"] is None and again["files_kept"] > 0
    assert verify(Path("part")) == []


@pytest.mark.usefixtures("team")
def test_status_says_where_a_cache_stands(caches: Caches) -> None:
    assert "not pushed to" in kdcache("cache", "status", caches["one"]).out
    kdcache("cache", "push", caches["one"], "--name", "sst2")
    kdcache("cache", "push", caches["two"], "--name", "sst2")
    said = kdcache("cache", "status", caches["one"])
    assert "pushed to" in said.out and "as sst2@1" in said.out
    assert "the newest version of 'sst2' is sst2@2: teacher 'roberta' is new there" in said.out
    assert f"kdcache cache diff {caches['one']} sst2@2" in said.err
    assert kdcache("cache", "status", caches["two"], "--json").document["pushed_as"] == ["sst2@2"]


def test_a_damaged_ref_or_a_closed_directory_does_not_hide_other_caches(
    team: Path, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    kdcache("cache", "push", caches["one"], "--name", "sst2")
    kdcache("cache", "push", caches["two"], "--name", "other")
    (team / "refs/other/1.json").write_text("garbage")
    said = kdcache("cache", "status", caches["one"])
    assert said.code == 0 and "as sst2@1" in said.out and "other: " in said.err
    kdcache("cache", "pull", "sst2")
    Path("lost+found").mkdir()
    real = Path.is_file

    def is_file(path: Path) -> bool:
        if path.parent.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert [cache["path"] for cache in kdcache("cache", "ls", "--json").document["caches"]][:1] == ["sst2"]
    said = kdcache("cache", "info", "lost+found")
    assert said.code == 3 and "cannot be read: Permission denied" in said.err


def test_versions_are_listed_dropped_and_collected(team: Path, caches: Caches) -> None:
    kdcache("cache", "push", caches["one"], "--name", "sst2")
    kdcache("cache", "push", caches["other"], "--name", "sst2")
    assert [line.split()[0] for line in kdcache("cache", "ls", "sst2").out.splitlines()[2:]] == ["sst2@2", "sst2@1"]
    said = kdcache("cache", "rm", "sst2@2")
    assert said.code == 0 and "sst2@2" in said.out
    assert kdcache("cache", "rm", "sst2@2").code == 4
    assert kdcache("cache", "info", "sst2", "--json").document["reference"] == "sst2@1"
    files = set(team.glob("files/*/*"))
    assert kdcache("cache", "gc", "--json").document["keys"] == []
    would = kdcache("cache", "gc", "--grace-days", "0")
    assert would.code == 0 and "would be deleted" in would.out and "--delete" in would.err
    assert set(team.glob("files/*/*")) == files
    did = kdcache("cache", "gc", "--grace-days", "0", "--delete", "--json").document
    left = {layout.file_key(digest.sha256) for digest in read_manifest(caches["one"]).contents.files.values()}
    assert {path.relative_to(team).as_posix() for path in team.glob("files/*/*")} == left
    assert did["files"] == len(files) - len(left)


def test_damage_on_the_remote_is_found_and_named(team: Path, caches: Caches) -> None:
    kdcache("cache", "push", caches["one"], "--name", "sst2")
    for flags in ([], ["--read-data"], ["--subset", "50%", "--seed", "1"]):
        said = kdcache("cache", "verify", "sst2", *flags)
        assert said.code == 0, said.err
    first, second = sorted(team.glob("files/*/*"))[:2]
    flip_bit(first)
    assert kdcache("cache", "verify", "sst2").code == 0
    delete(second)
    said = kdcache("cache", "verify", "sst2", "--read-data", "--json")
    assert said.code == 3
    assert [damage["file"] for damage in said.document["damaged"]] == [
        f"files/{one.parent.name}/{one.name}" for one in (first, second)
    ]
    assert kdcache("cache", "verify", "sst2", "--subset", "0").code == 2
    said = kdcache("cache", "pull", "sst2")
    assert said.code == 3 and (first.name in said.err or second.name in said.err)
    assert "Traceback" not in said.err


@pytest.mark.usefixtures("team")
def test_a_directory_wins_over_a_name(caches: Caches) -> None:
    kdcache("cache", "push", caches["one"], "--name", "sst2")
    Path("sst2").symlink_to(caches["two"])
    assert kdcache("cache", "info", "sst2", "--json").document["identity"] == read_manifest(caches["two"]).identity
    assert "every file is what" in kdcache("cache", "verify", "sst2").out


@pytest.mark.parametrize(
    "words",
    [
        ("--remote",),
        ("--remote", "--json"),
        ("--remote", "sst2"),  # the flag and then a name, as in 0.1.0
        ("sst2", "--remote"),
        ("--remote", "{team}"),
        ("--remote={team}", "sst2"),
        ("sst2", "--remote", "{team}"),
        ("--url", "{team}"),
        ("sst2",),
    ],
    ids=" ".join,
)
def test_ls_takes_a_url_like_all_others_and_the_earlier_forms(
    words: tuple[str, ...], team: Path, caches: Caches
) -> None:
    kdcache("cache", "push", caches["one"], "--name", "sst2")
    given = [word.format(team=team) for word in words]
    said = kdcache("cache", "ls", *given)
    assert (said.code, "sst2" in said.out) == (0, True), said.err
    assert "caches in" not in said.err


@pytest.mark.usefixtures("team")
def test_another_remote_than_that_of_the_environment(caches: Caches, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    kdcache("cache", "push", caches["one"], "--name", "sst2", "--remote", tmp_path / "theirs")
    assert kdcache("cache", "pull", "sst2").code == 4
    assert kdcache("cache", "ls", "--url", tmp_path / "theirs", "--json").document["names"][0]["name"] == "sst2"
    listed = kdcache("cache", "ls", "--remote", tmp_path / "theirs", "--json").document
    assert (listed["remote"], listed["names"][0]["name"]) == (str(tmp_path / "theirs"), "sst2")
    assert kdcache("cache", "ls", "--remote", "--json").document["names"] == []
    assert kdcache("remote", "check", "--remote", tmp_path / "theirs", "--json").document["usable"]
    assert kdcache("cache", "pull", "sst2", "--remote", tmp_path / "theirs").code == 0


@pytest.mark.usefixtures("team")
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["push", "nowhere", "--name", "sst2"], 2),
        (["pull", "sst2"], 4),
        (["pull", "../../etc"], 2),
        (["rm", "sst2"], 4),
        (["info", "sst2"], 4),
        (["verify", "sst2@v9"], 4),
        (["ls", "SST2"], 2),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_and_a_hint(command: list[str], code: int) -> None:
    said = kdcache("cache", *command)
    assert said.code == code
    assert said.out == ""
    assert [line.split(":")[0] for line in said.err.splitlines()] == ["error", "hint"]


def test_without_a_remote_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDCACHE_REMOTE", raising=False)
    for command in (["pull", "sst2"], ["ls", "--remote"], ["gc"]):
        said = kdcache("cache", *command)
        assert said.code == 2 and "KDCACHE_REMOTE" in said.err


@pytest.mark.usefixtures("team")
def test_interrupted_it_says_how_to_go_on(caches: Caches, monkeypatch: pytest.MonkeyPatch) -> None:
    kdcache("cache", "push", caches["one"], "--name", "sst2")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kdcache.share.pull.fetch_file", interrupt)
        said = kdcache("cache", "pull", "sst2")
    assert said.code == 130 and "Continue with the same command" in said.err
    assert kdcache("cache", "pull", "sst2").code == 0
