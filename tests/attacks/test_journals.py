"""Commit records that somebody else wrote, their checksums right.

The dump that goes on with them refuses them by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcache.cache.canonical import canonical_json, digest_of, parse_json
from kdcache.cache.layout import STATE
from kdcache.errors import DamageError
from kdcache.files import use_disk
from kdcache.testing.caches import dump, made_plan
from kdcache.testing.faults import Died, counting_disk, dying_disk

PLAN = made_plan(6, 2, ("bert",))
Change = Callable[[dict[str, Any]], Any]

RECORDS: dict[str, tuple[str, Change]] = {
    "no files": ("parts/part-00000.json", lambda record: record.pop("files")),
    "a list of files": ("parts/part-00000.json", lambda record: record.update(files=[])),
    "a file without size": ("parts/part-00001.json", lambda record: next(iter(record["files"].values())).pop("bytes")),
    "a file that climbs": (
        "parts/part-00000.json",
        lambda record: record["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}),
    ),
    "texts that are no number": ("parts/part-00000.json", lambda record: record.update(texts="4")),
    "a scope of its own": ("parts/part-00000.json", lambda record: record.update(scope="all")),
    "a precision that is a number": ("teachers/bert/teacher.json", lambda record: record["spec"].update(precision=32)),
    "a layer without projection": (
        "teachers/bert/teacher.json",
        lambda record: record["spec"]["layers"]["4"].pop("projection"),
    ),
    "a key more": ("teachers/bert/layer-02.json", lambda record: record.update(code="import os")),
    "tokens below zero": ("teachers/bert/part-00000.json", lambda record: record.update(tokens=-1)),
    "a base without identity": ("base.json", lambda record: record.pop("identity")),
    "a base of a text": ("base.json", lambda record: record.update(text_columns="sentence")),
}


def die_before_the_manifest(root: Path) -> None:
    """All records of a dump are there, and no manifest."""
    disk = counting_disk()
    with use_disk(disk):
        dump(root.with_name("whole"), PLAN)
    at = next(
        step for step, what in enumerate(disk.steps, 1) if what.startswith("rename") and what.endswith("manifest.json")
    )
    with use_disk(dying_disk(at)), contextlib.suppress(Died):
        dump(root, PLAN)


@pytest.mark.parametrize("attack", RECORDS)
def test_records(tmp_path: Path, attack: str) -> None:
    name, change = RECORDS[attack]
    root = tmp_path / "cache"
    die_before_the_manifest(root)
    path = root / STATE / name
    record = parse_json(path.read_bytes())
    record.pop("checksum")
    change(record)
    path.write_bytes(canonical_json({**record, "checksum": digest_of(record)}))
    with pytest.raises(DamageError, match=path.name) as caught:
        dump(root, PLAN)
    assert "\n" not in caught.value.message and "Remove" in caught.value.hint


def test_a_record_under_a_name_that_nobody_gives(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    die_before_the_manifest(root)
    path = root / STATE / "parts/part-00000.json"
    path.rename(path.with_name("part.json"))
    with pytest.raises(DamageError, match="no record has such a name"):
        dump(root, PLAN)
