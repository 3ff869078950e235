"""Manifests that were edited, and manifests that somebody made up: refused before any file is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcache.cache.manifest import MAX_BYTES, parse_manifest
from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify
from kdcache.errors import DamageError, MismatchError
from kdcache.testing.faults import edit_manifest

Copy = Callable[[Path], Path]
Change = Callable[[dict[str, Any]], None]
SHARD = "teachers/bert/hidden/part-00000.zarr/layer-04/c/0/0"


def put(*keys: str | int, value: object) -> Change:
    def change(document: dict[str, Any]) -> None:
        table: Any = document
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = value

    return change


def rename_file(old: str, new: str) -> Change:
    def change(document: dict[str, Any]) -> None:
        document["files"][new] = document["files"].pop(old)

    return change


def drop(*keys: str | int) -> Change:
    def change(document: dict[str, Any]) -> None:
        table: Any = document
        for key in keys[:-1]:
            table = table[key]
        del table[keys[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("task", "label_names", 0, value="awful"),
        put("files", SHARD, "sha256", value="0" * 64),
        put("provenance", "command", value="another"),
        put("checksum", value="0" * 64),
        put("identity", value="0" * 64),
        put("extra", value="x"),
        drop("checksum"),
        drop("splits", "train"),
    ],
)
def test_an_edit_is_seen(pristine: Path, copy_of: Copy, change: Change) -> None:
    path = copy_of(pristine)
    edit_manifest(path, change)
    with pytest.raises(DamageError, match="was edited") as caught:
        open_cache(path)
    assert caught.value.exit_code == 3
    assert [damage.file for damage in verify(path)] == ["manifest.json"]


EVIL: dict[str, Change] = {
    "belongs to nothing": put("files", "texts/../../etc", value={"bytes": 1, "sha256": "0" * 64}),
    "a path that climbs out": rename_file("texts/part-00000.arrow", "../texts/part-00000.arrow"),
    "an absolute path": rename_file("texts/part-00000.arrow", "/etc/passwd"),
    "a backslash": rename_file("texts/part-00000.arrow", "texts\\part-00000.arrow"),
    "a drive": rename_file("texts/part-00000.arrow", "C:/part-00000.arrow"),
    "an empty step": rename_file("texts/part-00000.arrow", "texts//part-00000.arrow"),
    "a hidden file": rename_file("texts/part-00000.arrow", "texts/.part-00000.arrow"),
    "another case": rename_file("texts/part-00000.arrow", "Texts/part-00000.arrow"),
    "a file too many": put("files", "teachers/bert/outputs/part-00009.arrow", value={"bytes": 1, "sha256": "0" * 64}),
    "a file too few": drop("files", "texts/part-00000.arrow"),
    "an examples file elsewhere": put("splits", "train", "file", value="texts/part-00000.arrow"),
    "a teacher with a slash": put("teachers", "a/b", value={}),
    "a teacher of dots": put("teachers", "..", value={}),
    "a huge array": put("teachers", "bert", "tokens", "part-00000", value=2**31 - 1),
    "a larger array": put("teachers", "bert", "tokens", "part-00000", value=10**6),
    "a negative count": put("teachers", "bert", "tokens", "part-00000", value=-1),
    "a wide layer": put("teachers", "bert", "layers", "4", "dim", value=65536),
    "another dtype": put("teachers", "bert", "layers", "4", "dtype", value="float16"),
    "a dtype that is no name": put("teachers", "bert", "layers", "4", "dtype", value="<f4;"),
    "a layer too deep": put("teachers", "bert", "depth", value=3),
    "a shard of another size": put("files", SHARD, "bytes", value=2**39),
    "metadata of its own": put("files", SHARD.replace("c/0/0", "zarr.json"), "sha256", value="0" * 64),
    "a string for a number": put("settings", "part_size", value="4"),
    "a part too large": put("settings", "part_size", value=2),
    "parts out of order": put("parts", 0, "name", value="part-00001"),
    "an unknown scope": put("parts", 0, "scope", value="half"),
    "labels that are not distinct": put("task", "label_names", value=["bad", "bad"]),
    "a label too many": put("task", "label_names", value=["bad", "good", "ugly"]),
    "an endless label": put("task", "label_names", value=["bad", "x" * 2000]),
    "no columns": put("task", "text_columns", value=[]),
    "an unknown key": put("pickle", value="payload"),
    "an unknown target": put("teachers", "bert", "target", "kind", value="pickle"),
    "an older version": put("version", value=0),
    "another format": put("format", value="tar"),
    "a fingerprint that is none": put("teachers", "bert", "fingerprints", "weights", value="x"),
}


@pytest.mark.parametrize("name", EVIL)
def test_made_up_manifests_are_refused(pristine: Path, copy_of: Copy, name: str) -> None:
    path = copy_of(pristine)
    edit_manifest(path, EVIL[name], resign=True)
    with pytest.raises(DamageError, match="is not a valid manifest"):
        open_cache(path)


def test_teachers_that_differ_in_case_only(pristine: Path, copy_of: Copy) -> None:
    path = copy_of(pristine)

    def change(document: dict[str, Any]) -> None:
        document["teachers"]["Bert"] = document["teachers"]["bert"]
        files = {
            file.replace("/bert/", "/Bert/"): entry for file, entry in document["files"].items() if "/bert/" in file
        }
        document["files"] |= files

    edit_manifest(path, change, resign=True)
    with pytest.raises(DamageError, match="differ in case only"):
        open_cache(path)


def test_a_newer_format_says_to_upgrade(pristine: Path, copy_of: Copy) -> None:
    path = copy_of(pristine)
    edit_manifest(path, put("version", value=2), resign=True)
    with pytest.raises(MismatchError, match="cache format 2; this kdcache reads format 1") as caught:
        open_cache(path)
    assert "pip install -U kdcache" in caught.value.hint


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b"\xff\xfe", b'{"version":2}', b"[" * 10**6, b'{"a":1.5}', b'{"a":1,"a":1}']
)
def test_what_is_no_manifest_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(DamageError, match="here"):
        parse_manifest(data, "'here'")


def test_a_manifest_beyond_bounds_is_not_read(pristine: Path, copy_of: Copy) -> None:
    path = copy_of(pristine)
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(DamageError, match="at most"):
        open_cache(path)


def test_a_linked_manifest_is_refused(pristine: Path, copy_of: Copy, tmp_path: Path) -> None:
    path = copy_of(pristine)
    (path / "manifest.json").rename(tmp_path / "elsewhere.json")
    (path / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(DamageError, match="not a cache"):
        open_cache(path)
