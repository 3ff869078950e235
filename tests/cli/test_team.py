"""A team of two on a real S3 server, by command line alone, from the first push to the last gc."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kdcache.cache.manifest import read_manifest
from kdcache.share.keys import parse_file_key
from kdcache.share.stores.base import Remote
from kdcache.testing.s3_server import S3Server
from kdcache.testing.teachers import make_teachers
from tests.cli.commands import Said, kdcache
from tests.dump.conftest import Workbench


def ok(*arguments: object) -> Said:
    said = kdcache(*arguments)
    assert said.code == 0, said.err
    return said


def files_on(remote: Remote) -> dict[str, int]:
    """Bytes of every data file by its digest."""
    return {sha: entry.size for entry in remote.list("files/") if (sha := parse_file_key(entry.key))}


@pytest.fixture
def team(seaweedfs: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """KDCACHE_REMOTE and its credentials, a home and a working directory of a colleague who has nothing yet."""
    url = seaweedfs.url()
    for name, value in {
        **seaweedfs.environment(),
        "KDCACHE_REMOTE": url,
        "KDCACHE_HOME": str(tmp_path / "home"),
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return seaweedfs.open(url)


def test_from_the_first_push_to_the_last_gc(
    team: Remote, tmp_path: Path, review_recipe: Path, tiny_models: dict[str, Path]
) -> None:
    teachers = make_teachers(tmp_path / "teachers", {"bert": "bert", "roberta": "roberta", "xlm": "xlm-roberta"})
    bench = Workbench(review_recipe, teachers, tmp_path / "cache").only("bert", "roberta")
    bench.dump()
    size = sum({digest.sha256: digest.size for digest in read_manifest(bench.cache).contents.files.values()}.values())

    assert "would be sent" in ok("cache", "push", bench.cache, "--name", "reviews", "--dry-run").out
    assert not list(team.list(""))
    pushed = ok("cache", "push", bench.cache, "--name", "reviews", "--tag", "first", "--json").document
    assert (pushed["reference"], sum(files_on(team).values())) == ("reviews@1", size)
    assert ok("cache", "push", bench.cache, "--name", "reviews", "--json").document["bytes_sent"] == 0
    assert [one["name"] for one in ok("cache", "ls", "--remote", "--json").document["names"]] == ["reviews"]

    part = ok(
        "cache", "pull", "reviews", "--teachers", "bert", "--no-hidden", "--no-text", "--to", "part", "--json"
    ).document
    assert part["selection"] == {"teachers": {"bert": []}, "text": False} and part["bytes_fetched"] < size / 4
    assert "every selected file" in ok("cache", "verify", "part").out
    student = [f'student.init_from="{tiny_models["bert"]}"', "data.transfer=[]", 'distill.teachers=["bert"]']
    flags = [word for setting in student for word in ("--set", setting)]
    refused = kdcache("distill", bench.recipe_file, "--cache", "part", *flags)
    assert refused.code == 4 and "kdcache cache pull reviews@1" in refused.err
    trained = ok("distill", bench.recipe_file, "--cache", "reviews", *flags, "--json").document
    assert trained["method"] == "mt-bert" and set(trained["teachers"]) == {"bert"}

    before = files_on(team)
    grown = ok("cache", "extend", "reviews", "--teacher", f"xlm={teachers}", "--tag", "three", "--json").document
    added = {sha: count for sha, count in files_on(team).items() if sha not in before}
    of_xlm = {
        digest.sha256
        for path, digest in read_manifest(Path(grown["cache"])).contents.files.items()
        if path.startswith("teachers/xlm/")
    }
    assert grown["reference"] == "reviews@2" and added.keys() <= of_xlm and sum(added.values()) == grown["bytes_new"]

    assert (
        "the newest version of 'reviews' is reviews@2: teacher 'xlm' is new there"
        in ok("cache", "status", bench.cache).out
    )
    different = kdcache("cache", "diff", "reviews@first", "reviews@three")
    assert different.code == 3 and "teacher xlm: + only in the second" in different.out
    ok("cache", "pull", "reviews@three", "--to", "all")
    assert "every file is what" in ok("cache", "verify", "all").out
    assert "xlm" in ok("cache", "info", "reviews").out

    assert "reviews@1" in ok("cache", "rm", "reviews@1").out
    assert kdcache("cache", "pull", "reviews@1", "--to", "gone").code == 4
    time.sleep(1.1)  # the store's clock has whole seconds, and nothing of this second is collected
    collected = ok("cache", "gc", "--grace-days", "0", "--delete", "--json").document
    assert (collected["files"], collected["manifests"], collected["refs"]) == (
        0,
        1,
        1,
    )  # version 2 has every file of version 1
    assert "every byte is right" in ok("cache", "verify", "reviews", "--read-data").out
