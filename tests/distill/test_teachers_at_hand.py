"""Teachers beside a cache: their files are read once per process, and no model is made of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kdcache.cache.reader import open_cache
from kdcache.distill.teachers_at_hand import TeacherFacts, taken_over, teacher_facts, teachers_beside
from kdcache.errors import MismatchError
from kdcache.teachers import bundle
from kdcache.teachers.bundle import load_teacher
from kdcache.testing.teachers import make_teachers
from tests.conftest import TinyRun

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """No teacher may be loaded."""

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(bundle, "load_teacher", refused)


def test_a_process_reads_the_files_of_a_teacher_once_until_they_change(
    tiny_run: TinyRun, copied: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers, cache, read = copied(tiny_run.teachers), open_cache(tiny_run.cache), []
    check = bundle.check_files

    def counting(directory: Path, name: str, *args: Any, **options: Any) -> Any:
        read.append(name)
        return check(directory, name, *args, **options)

    monkeypatch.setattr(bundle, "check_files", counting)
    first = teacher_facts(teachers, cache, ["bert", "xlm"])
    assert teacher_facts(teachers, cache, ["xlm", "bert"]) == first
    assert read == ["bert", "xlm"]
    config = teachers / "bert" / "tokenizer_config.json"
    os.utime(config, ns=(0, 0))
    teacher_facts(teachers, cache, ["bert", "xlm"])
    assert read == ["bert", "xlm", "bert"]
    weights = teachers / "xlm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(MismatchError, match="xlm"):
        teacher_facts(teachers, cache, ["xlm"])


def test_a_student_takes_over_its_teacher_and_the_shared_head_and_nothing_of_an_added_teacher(
    tiny_run: TinyRun, copied: Callable[[Path], Path]
) -> None:
    teachers = copied(tiny_run.teachers)

    def found(*overrides: str) -> dict[str, str]:
        return taken_over(tiny_run.recipe(*overrides).require_student(), teachers)

    before, shared = found(), found("student.head=shared")
    assert list(shared) == ["teachers/bert", "teachers/shared_head.safetensors"]
    assert before == {"teachers/bert": shared["teachers/bert"]}
    assert found("student.init_from=hub/bert") == {} == taken_over(tiny_run.recipe().require_student(), None)
    described = bundle.read_bundle(teachers)
    added = {**described.teachers, "late": described.teachers["roberta"]}
    bundle.write_bundle(teachers, replace(described, teachers=added, training={"added": {"late": {}}}))
    assert found("student.head=shared") == shared
    prints = replace(described.teachers["bert"].fingerprints, weights="other")
    added["bert"] = replace(described.teachers["bert"], fingerprints=prints)
    bundle.write_bundle(teachers, replace(described, teachers=added))
    (teachers / bundle.HEAD_FILE).write_bytes(b"other")
    after = found("student.head=shared")
    assert after.keys() == shared.keys() and not after.items() & shared.items()


@pytest.mark.parametrize("file", ["adapter.safetensors", "../shared_head.safetensors"])
def test_other_files_than_the_described_ones_are_refused(
    tiny_run: TinyRun, copied: Callable[[Path], Path], file: str
) -> None:
    teachers = copied(tiny_run.teachers)
    changed = teachers / "roberta" / file
    changed.write_bytes(changed.read_bytes()[:-4] + bytes(4))
    with pytest.raises(MismatchError, match=r"roberta.* is not the one that teachers\.json describes: head"):
        teacher_facts(teachers, open_cache(tiny_run.cache), ["roberta"])


@pytest.mark.usefixtures("no_models")
def test_another_teacher_is_refused_every_time(tiny_run: TinyRun, tmp_path: Path) -> None:
    other = make_teachers(tmp_path / "other", {"bert": "bert"}, seed=5)
    cache = open_cache(tiny_run.cache)
    for _ in range(2):
        with pytest.raises(MismatchError, match=r"is not the one of cache .* they differ in weights"):
            teacher_facts(other, cache, ["bert"])


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("at_hand", [True, False])
def test_size_and_speed_come_from_the_cache(tiny_run: TinyRun, at_hand: bool) -> None:
    cache = open_cache(tiny_run.cache)
    found = teacher_facts(tiny_run.teachers if at_hand else None, cache, ["bert", "roberta", "xlm"])
    for name in found:
        model = load_teacher(tiny_run.teachers, name).model
        assert found[name].parameters == sum(parameter.numel() for parameter in model.parameters())
        assert found[name].measured_on == "cpu, float32, torch"
        assert (found[name].latency_ms or 0) > 0
        assert (found[name].texts_per_second or 0) > 0


def test_a_cache_of_0_1_0_does_not_say_how_fast_its_teachers_are() -> None:
    cache = open_cache(FIXTURES / "cache-0.1.0" / "cache")
    found = teacher_facts(None, cache, list(cache.teachers))
    assert set(found.values()) == {TeacherFacts()}


@pytest.mark.parametrize("record", ["none", {"latency_ms": "nan", "parameters": -1}, {"latency_ms": [1]}])
def test_a_forged_record_is_no_speed(tiny_run: TinyRun, record: Any) -> None:
    cache = open_cache(tiny_run.cache)
    manifest = SimpleNamespace(provenance={"teachers": {"bert": record}})
    found = teacher_facts(None, cast("Any", SimpleNamespace(manifest=manifest, teachers=cache.teachers)), ["bert"])
    assert found == {"bert": TeacherFacts()}


def test_a_student_of_a_sweep_finds_the_teachers_of_its_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "reviews"
    student = run / "sweep" / "0123456789ab-s0"
    student.mkdir(parents=True)
    (run / "teachers").symlink_to(tiny_run.teachers)
    assert teachers_beside(None, student) == run / "teachers"
    assert teachers_beside(None, run) == run / "teachers"
    assert teachers_beside(None, run / "sweep" / "something-else") is None


@pytest.mark.parametrize("same", [True, False])
def test_a_student_of_a_cache_of_its_own_takes_teachers_that_made_it(
    tiny_run: TinyRun, tmp_path: Path, same: bool
) -> None:
    """A cell of a sweep may name another cache, of the same teachers or of others with the same names."""
    run, other = tmp_path / "runs" / "reviews", tmp_path / "runs" / "other"
    student = run / "sweep" / "0123456789ab-s0"
    for directory in (student, other):
        directory.mkdir(parents=True)
    (other / "cache").symlink_to(tiny_run.cache)
    cache = open_cache(other / "cache")
    (run / "teachers").symlink_to(
        tiny_run.teachers if same else make_teachers(tmp_path / "new", {"bert": "bert"}, seed=5)
    )
    assert teachers_beside(cache, student) == (run / "teachers" if same else None)
    assert teachers_beside(cache, run) == run / "teachers"
    (other / "teachers").symlink_to(tiny_run.teachers)
    assert teachers_beside(cache, student) == other / "teachers"
