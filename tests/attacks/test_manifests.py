"""Manifests and selections that try something.

Those with paths of their own and wrong counts are in tests/cache/test_manifest.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cache.arrays import array_metadata, shard_bytes, shard_name
from kdcache.cache.manifest import MAX_BYTES
from kdcache.cache.selection import SELECTION
from kdcache.files import digest_bytes
from kdcache.testing.faults import edit_manifest
from tests.attacks.victim import BERT, assert_refused, signed

Change = Callable[[dict[str, Any]], Any]


def text_of(victim: Path) -> str:
    return (victim / "manifest.json").read_text()


RAW: dict[str, Callable[[str], bytes]] = {
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "NaN": lambda text: text.replace('"seed": 3', '"seed": NaN').encode(),
    "infinity": lambda text: text.replace('"seed": 3', '"seed": -Infinity').encode(),
    "a number beyond all": lambda text: text.replace('"seed": 3', '"seed": 1e999').encode(),
    "an integer of a million digits": lambda text: text.replace('"seed": 3', f'"seed": {"9" * 1_000_000}').encode(),
    "minus zero": lambda text: text.replace('"seed": 3', '"seed": -0').encode(),
    "nesting without end": lambda text: text.replace('"seed": 3', f'"seed": {"[" * 200_000}').encode(),
    "objects in objects": lambda text: text.replace('"seed": 3', '"seed": ' + '{"a":' * 100_000).encode(),
    "a key twice": lambda text: text.replace('"seed": 3', '"seed": 3, "seed": 4').encode(),
    "null": lambda text: text.replace('"seed": 3', '"seed": null').encode(),
    "half of a surrogate pair": lambda text: text.replace('"made up"', '"\\ud800"').encode(),
    "half of a surrogate pair as a key": lambda text: text.replace('"command"', '"\\udfff"').encode(),
    "bytes that are no UTF-8": lambda text: text.encode().replace(b"made up", b"made \xff"),
    "something behind it": lambda text: text.encode() + b"{}",
    "nothing": lambda _: b"",
}


@pytest.mark.parametrize("attack", RAW)
def test_json_that_is_none(victim: Path, attack: str) -> None:
    (victim / "manifest.json").write_bytes(RAW[attack](text_of(victim)))
    assert_refused(victim, by_info=True)


def put(table: str, key: str, value: Any) -> Change:
    return lambda document: document[table].__setitem__(key, value)


def crowded(document: dict[str, Any]) -> None:
    """A part with one token more than its four texts of at most 16 tokens can have.

    All that follows from it is right.
    """
    rows, arrays = 4 * 16 + 1, f"{BERT}/hidden/part-00000.zarr/layer"
    document["teachers"]["bert"]["tokens"]["part-00000"] = rows
    shapes = {"02": ((rows, 3), "int8"), "02-scale": ((rows,), "float32"), "04": ((rows, 6), "float32")}
    for name, (shape, dtype) in shapes.items():
        metadata = digest_bytes(array_metadata(shape, dtype))
        document["files"][f"{arrays}-{name}/zarr.json"] = {"bytes": metadata.size, "sha256": metadata.sha256}
        document["files"][f"{arrays}-{name}/{shard_name(len(shape))}"]["bytes"] = shard_bytes(
            shape, np.dtype(dtype).itemsize
        )


SIGNED: dict[str, Change] = {
    "a million labels": put("task", "label_names", [f"label {number}" for number in range(1_000_000)]),
    "a label that steers a terminal": put("task", "label_names", ["bad", "\x1b]0;owned\x07\x1b[2J"]),
    "a column that breaks the line": put("task", "text_columns", ["sentence\nerror: all is well"]),
    "a hundred thousand parts too many": lambda d: d.update(
        parts=[{"name": "part-00000", "scope": "full", "texts": 1}] * 100_001
    ),
    "a part without end": put("settings", "part_size", 2**53 - 1),
    "more tokens than its texts can have": crowded,
    "a negative part": put("settings", "part_size", -1),
    "a teacher called like a device": lambda d: d["teachers"].update({"NUL ": d["teachers"].pop("bert")}),
    "a teacher with a NUL": lambda d: d["teachers"].update({"be\0rt": d["teachers"].pop("bert")}),
    "a teacher that climbs": lambda d: d["teachers"].update({"../../bert": d["teachers"].pop("bert")}),
    "a split that climbs": lambda d: d["splits"].update({"../train": d["splits"].pop("train")}),
    "a list for an object": lambda d: d.update(files=list(d["files"])),
    "a string for a list": put("task", "label_names", "good"),
    "deep provenance": put("provenance", "deep", json.loads("[" * 40 + "]" * 40)),
    "text ids of a terabyte": lambda d: d["files"]["texts/part-00000.arrow"].update(bytes=2**40),
    "a tokenizer of a terabyte": lambda d: d["files"][f"{BERT}/tokenizer/tokenizer.json"].update(bytes=2**40),
    "logits of a terabyte": lambda d: d["files"][f"{BERT}/outputs/part-00000.arrow"].update(bytes=2**40),
    "tokens of a terabyte": lambda d: d["files"][f"{BERT}/tokens/part-00000.arrow"].update(bytes=2**40),
    "a basis of a terabyte": lambda d: d["files"][f"{BERT}/basis/layer-02.safetensors"].update(bytes=2**40),
    "texts of a terabyte": lambda d: d["files"]["text/part-00000.arrow"].update(bytes=2**40),
    "a giant chunk": lambda d: d["files"][f"{BERT}/hidden/part-00000.zarr/layer-04/c/0/0"].update(bytes=2**40),
}


@pytest.mark.parametrize("attack", SIGNED)
def test_manifests_with_their_digests_right(victim: Path, attack: str) -> None:
    document = json.loads(text_of(victim))
    SIGNED[attack](document)
    try:
        document = signed(document)
    except ValueError:  # deeper than the canonical form goes: an attacker leaves the old digests
        assert attack == "deep provenance"
    (victim / "manifest.json").write_text(json.dumps(document))
    assert_refused(victim, by_info=True)


def test_a_manifest_of_a_terabyte(victim: Path) -> None:
    with (victim / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)
    assert_refused(victim, by_info=True)
    os.truncate(victim / "manifest.json", MAX_BYTES + 1)
    assert_refused(victim, by_info=True)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("/etc/passwd")])
def test_a_manifest_that_is_no_file(victim: Path, make: Callable[[Path], None]) -> None:
    (victim / "manifest.json").unlink()
    make(victim / "manifest.json")
    assert_refused(victim, by_info=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        os.mkfifo,
        lambda path: path.symlink_to("/etc/passwd"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.write_bytes(b"[" * 300_000),
        lambda path: (path.touch(), os.truncate(path, 1 << 40)),
        lambda path: path.write_text(
            '{"format":"kdcache-selection","version":1,"teachers":{"..":[]},"text":"no","complete":"yes"}'
        ),
    ],
    ids=["directory", "fifo", "link", "dangling link", "nested", "terabyte", "climbing"],
)
def test_selections(victim: Path, make: Callable[[Path], None]) -> None:
    make(victim / SELECTION)
    assert_refused(victim, by_info=True)


def test_a_page_and_a_command_that_steer_the_terminal(victim: Path) -> None:
    """Neither is refused, since pages and provenance may say anything; both are shown as they are and not obeyed."""
    from tests.cli.commands import kdcache

    (victim / "README.md").write_text("\x1b]0;owned\x07" * 1000)
    edit_manifest(
        victim,
        lambda document: document["provenance"].update(command="\x1b[2J\x9b31m\r\nerror: all is well"),
        resign=True,
    )
    for arguments in (("cache", "info", victim), ("cache", "verify", victim), ("cache", "info", victim, "--json")):
        said = kdcache(*arguments)
        assert said.code == 0 and not {"\x1b", "\x9b", "\x07", "\r"} & set(said.out + said.err)
