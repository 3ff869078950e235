"""From what a user types to a remote, or to a line that says what to type."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.errors import RecipeError
from kdcache.share.stores.directory import DirectoryRemote
from kdcache.share.stores.registry import default_remote, open_remote
from tests.cli.commands import kdcache


def test_a_directory_by_path_or_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with space").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "with space", f"file://{tmp_path}/with%20space", "~/with space", "with space"):
        remote = open_remote(str(name))
        assert isinstance(remote, DirectoryRemote)
        assert remote.url == str(tmp_path / "with space")


def test_stores_by_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "team")
    for url in ("s3://team-bucket/kdcache", "s3://team-bucket", "gs://team/a/b", "az://team/kdcache"):
        assert open_remote(url).url == url
        assert open_remote(f"{url}/").url == url


@pytest.mark.parametrize(
    ("url", "said", "hint"),
    [
        ("s3://", "names no bucket", "s3://BUCKET/PREFIX"),
        ("s3:///prefix", "names no bucket", "s3://BUCKET/PREFIX"),
        ("gs://a b/x", "no name of a bucket", "gs://BUCKET"),
        ("s3://bucket/a//b", "no prefix", "single slashes"),
        ("s3://bucket/../b", "no prefix", "Use letters"),
        ("s3a://bucket/x", "names no remote", "s3://BUCKET"),
        ("abfss://c@account/x", "names no remote", "az://BUCKET"),
        ("http://host/bucket", "'http' is not known", "A remote is a directory"),
        ("file://host/share", "no directory of this machine", "file:///path"),
        ("", "names no remote", "A remote is"),
        ("s3://key:hunter22@bucket/x", "holds more than a bucket", "AWS_SECRET_ACCESS_KEY"),
        ("s3://bucket/x?secret=hunter22", "holds more than a bucket", "AWS_ENDPOINT_URL"),
        ("ftp://me:hunter22@host/x", "'ftp' is not known", "A remote is"),
    ],
)
def test_what_names_no_remote_is_told_how(url: str, said: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        open_remote(url)
    assert said in caught.value.message
    assert hint in caught.value.hint
    assert "hunter22" not in caught.value.message + caught.value.hint


def test_a_directory_that_is_not_there_is_told_how_to_make(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no directory") as caught:
        open_remote(str(tmp_path / "none"))
    assert f"mkdir -p '{tmp_path}/none'" in caught.value.hint
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="is a file"):
        open_remote(str(tmp_path / "file"))


def test_the_default_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_REMOTE", str(tmp_path))
    assert default_remote().url == str(tmp_path)
    for nothing in ("", "  "):
        monkeypatch.setenv("KDCACHE_REMOTE", nothing)
        said = kdcache("remote", "check")
        assert said.code == 2
        assert "KDCACHE_REMOTE is not set" in said.err
        assert "export KDCACHE_REMOTE=URL" in said.err


def test_an_account_that_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(RecipeError, match="Account must be specified"):
        open_remote("az://container/x")
