"""The golden layout: every file of a small cache, and its identity. A change here is a change of the format."""

from __future__ import annotations

import json
from pathlib import Path

from kdcache.cache.canonical import canonical_json, digest_of
from kdcache.cache.verify import unreferenced, verify
from kdcache.testing.caches import dump, made_plan

# with the pyarrow and safetensors of constraints.txt
IDENTITY = "a92784f4a57e4654cdd6fcbe5c6fa0f441e43e65e17ab4ae9044205107129e95"
PART_OF_A_TEACHER = [
    "hidden/{part}.zarr/layer-02-scale/c/0",
    "hidden/{part}.zarr/layer-02-scale/zarr.json",
    "hidden/{part}.zarr/layer-02/c/0/0",
    "hidden/{part}.zarr/layer-02/zarr.json",
    "hidden/{part}.zarr/layer-04/c/0/0",
    "hidden/{part}.zarr/layer-04/zarr.json",
    "hidden/{part}.zarr/zarr.json",
    "tokens/{part}.arrow",
]


def test_files_and_identity(pristine: Path) -> None:
    document = json.loads((pristine / "manifest.json").read_text())
    full, logits = ["part-00000", "part-00001", "part-00002"], ["part-00003", "part-00004"]
    expected = {split["file"] for split in document["splits"].values()}
    expected |= {f"{directory}/{part}.arrow" for directory in ("texts", "text") for part in full + logits}
    for teacher in ("bert", "roberta"):
        home = f"teachers/{teacher}"
        expected |= {
            f"{home}/tokenizer/tokenizer.json",
            f"{home}/basis/layer-02.safetensors",
            f"{home}/basis/layer-04.safetensors",
        }
        expected |= {f"{home}/outputs/{part}.arrow" for part in full + logits}
        expected |= {f"{home}/{file.format(part=part)}" for file in PART_OF_A_TEACHER for part in full}
    assert set(document["files"]) == expected
    apart = {"manifest.json", "README.md", ".dump/lock", ".dump/holder.json"}
    there = {path.relative_to(pristine).as_posix() for path in pristine.rglob("*") if path.is_file()}
    assert there == expected | apart
    assert unreferenced(pristine) == []
    assert document["identity"] == IDENTITY


def test_identity_and_checksum_are_those_of_the_specification(pristine: Path) -> None:
    document = json.loads((pristine / "manifest.json").read_text())
    checksum = document.pop("checksum")
    assert checksum == digest_of(document)
    identity = document.pop("identity")
    document.pop("provenance")
    assert identity == digest_of(document)
    assert canonical_json(document).startswith(b'{"files":{"data/test-')


def test_identity_does_not_depend_on_provenance_or_card(tmp_path: Path, pristine: Path) -> None:
    manifest = dump(
        tmp_path / "c", made_plan(), provenance={"score": 0.5, "ok": True, "none": None, "nested": {"steps": [1, 2.5]}}
    )
    assert manifest.identity == json.loads((pristine / "manifest.json").read_text())["identity"]
    assert manifest.provenance == {"score": "0.5", "ok": "true", "nested": {"steps": [1, "2.5"]}}


def test_a_dump_that_changes_nothing_leaves_the_manifest(tmp_path: Path) -> None:
    plan = made_plan(4, 2, ["bert"])
    dump(tmp_path / "c", plan, provenance={"run": "first"})
    before = (tmp_path / "c/manifest.json").stat().st_mtime_ns
    dump(tmp_path / "c", plan, provenance={"run": "second"})
    assert (tmp_path / "c/manifest.json").stat().st_mtime_ns == before
    assert verify(tmp_path / "c") == []
