"""Putting together what two writers added.

The same cache as one dump of everything, nothing copied, and refusals by name.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kdcache.cache.manifest import read_manifest
from kdcache.cache.merge import merge
from kdcache.cache.spec import Fingerprints, Settings, TeacherSpec
from kdcache.cache.verify import verify
from kdcache.codecs.base import LayerSpec
from kdcache.errors import MismatchError
from kdcache.testing.caches import LAYERS, Plan, dump, made_plan, made_teacher

ONE = LayerSpec("pca", 3, "int8")


def plan(*teachers: TeacherSpec) -> Plan:
    return replace(made_plan(), teachers=teachers)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    dump(tmp_path / "base", made_plan(teachers=["bert"]))
    return tmp_path / "base"


def grown(base: Path, name: str, wanted: Plan, provenance: Sequence[str] = ()) -> Path:
    place = Path(shutil.copytree(base, base.parent / name))
    records = {"command": name, "teachers": {teacher: {"source": name} for teacher in provenance}}
    dump(place, wanted, provenance=records)
    return place


def test_teachers_and_layers_of_both_are_one_dump_of_all(base: Path, tmp_path: Path) -> None:
    bert = made_teacher("bert")
    theirs = grown(base, "theirs", plan(bert, made_teacher("roberta")), ["bert", "roberta"])
    mine = grown(base, "mine", plan(made_teacher("bert", {**LAYERS, 1: ONE}), made_teacher("xlm")), ["bert", "xlm"])
    merged = merge(theirs, mine, read_manifest(base).contents)
    everything = dump(
        tmp_path / "all", plan(made_teacher("bert", {**LAYERS, 1: ONE}), made_teacher("roberta"), made_teacher("xlm"))
    )
    assert merged.identity == everything.identity == read_manifest(theirs).identity
    assert verify(theirs) == []
    for path in merged.contents.files.keys() - read_manifest(base).contents.files.keys():
        declared = path.startswith("teachers/roberta") or path.endswith("tokenizer.json")
        assert declared or (theirs / path).samefile(mine / path)
    sources = {name: record["source"] for name, record in merged.provenance["teachers"].items()}
    assert sources == {"bert": "mine", "roberta": "theirs", "xlm": "mine"}
    assert merge(theirs, mine, read_manifest(base).contents).identity == merged.identity  # nothing is left to add


def test_what_was_dropped_meanwhile_does_not_come_back(base: Path) -> None:
    """The newest version lacks a teacher of the base: somebody removed it, and only what was added is put on top."""
    theirs = base.parent / "theirs"
    dump(theirs, made_plan(teachers=["roberta"]))
    mine = grown(base, "mine", made_plan(teachers=["bert", "xlm"]))
    assert set(merge(theirs, mine, read_manifest(base).contents).contents.teachers) == {"roberta", "xlm"}


def test_replaced_examples_come_along_unless_both_replaced_them(base: Path) -> None:
    old = read_manifest(base).contents
    theirs, mine = grown(base, "theirs", made_plan(teachers=["bert"])), base.parent / "mine"
    shutil.copytree(base, mine)
    fewer = replace(made_plan(teachers=["bert"]), train=dict(list(made_plan().train.items())[:7]))
    dump(mine, fewer)
    assert merge(theirs, mine, old).contents.splits["train"].examples == 7
    dump(theirs, replace(fewer, train=dict(list(fewer.train.items())[:5])))
    before = (theirs / "manifest.json").read_bytes()
    with pytest.raises(MismatchError, match="examples of 'train' were changed here and by somebody else"):
        merge(theirs, mine, old)
    assert (theirs / "manifest.json").read_bytes() == before


OTHER = Fingerprints(*("0" * 64,) * 4)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (
            made_plan(11, teachers=["bert"]),
            "a cache with 15 texts in 5 parts; the newest version has 16 texts in 5 parts",
        ),
        (
            replace(made_plan(teachers=["bert"]), settings=Settings(4, 4)),
            "the seed 3; the newest version has the seed 4",
        ),
        (
            replace(made_plan(teachers=["bert"]), store_text=False),
            "texts that are stored; the newest version has texts that are absent",
        ),
        (plan(made_teacher("bert"), made_teacher("xlm", fingerprints=OTHER)), "holds teacher 'xlm' with weights"),
        (plan(made_teacher("bert", {**LAYERS, 1: LayerSpec("pca", 2, "int8")})), "dim of layer 1"),
    ],
)
def test_what_differs_is_named(base: Path, theirs: Plan, reason: str) -> None:
    dump(base.parent / "theirs", theirs)
    mine = grown(base, "mine", plan(made_teacher("bert", {**LAYERS, 1: ONE}), made_teacher("xlm")))
    before = read_manifest(base.parent / "theirs").identity
    with pytest.raises(MismatchError, match=reason) as caught:
        merge(base.parent / "theirs", mine, read_manifest(base).contents)
    assert caught.value.exit_code == 4 and caught.value.hint
    assert read_manifest(base.parent / "theirs").identity == before
