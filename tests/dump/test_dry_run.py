from __future__ import annotations

import json
from collections import Counter

import pytest

from kdcache.cache.reader import open_cache
from kdcache.dump.dry_run import DryRun, estimate_dump
from kdcache.dump.stage import dump_teachers
from kdcache.errors import MismatchError
from kdcache.progress import SilentProgress
from kdcache.teachers.bundle import load_teacher
from tests.dump.conftest import Workbench


def _dry_run(bench: Workbench, *overrides: str) -> DryRun:
    return estimate_dump(bench.recipe(*overrides), bench.teachers, bench.cache, progress=SilentProgress())


def _hidden_payload(bench: Workbench, teacher: str, layer: int) -> int:
    cache = open_cache(bench.cache)
    blocks = [cache.hidden(teacher, part.name, layer) for part in cache.parts if part.scope == "full"]
    return sum(block.values.nbytes + (0 if block.scales is None else block.scales.nbytes) for block in blocks)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_the_plan_is_what_the_dump_then_writes(bench: Workbench, dtype: str) -> None:
    settings = ("dump.layers=[2, 4]", f"dump.dtype={dtype}")
    plan = _dry_run(bench, *settings)
    assert not bench.cache.exists()
    assert (plan.full_texts, plan.logits_texts, plan.existing_texts) == (120, 64, 0)
    report = bench.dump(*settings)
    for teacher, run in zip(plan.teachers, report.runs, strict=True):
        assert teacher.teacher == run.teacher
        assert teacher.texts == run.texts == 184
        assert teacher.outputs == 184 * 2 * 4
        assert teacher.hidden == {layer: _hidden_payload(bench, teacher.teacher, layer) for layer in (2, 4)}
        assert teacher.seconds > 0
        assert teacher.bytes == pytest.approx(run.bytes, rel=0.6)  # tiny files: headers weigh
    assert plan.free > 0


def test_what_exists_is_not_planned_again(bench: Workbench, forward_passes: Counter[object]) -> None:
    bench.only("bert", "roberta").dump("dump.layers=[2]", "data.transfer=[]")
    before = {path: path.stat().st_mtime_ns for path in bench.cache.rglob("*")}
    forward_passes.clear()
    plan = _dry_run(bench, "dump.layers=[2, 3]")
    assert {path: path.stat().st_mtime_ns for path in bench.cache.rglob("*")} == before
    bert, _, xlm = plan.teachers
    assert plan.existing_texts == 96 + 64
    assert plan.existing_teachers == ("bert", "roberta")
    assert bert.stored_layers == (2,)
    assert bert.texts == 120  # 96 for the new layer, 24 new ones for everything
    assert bert.outputs == 24 * 2 * 4
    assert xlm.texts == 184
    report = bench.dump("dump.layers=[2, 3]")
    assert [run.texts for run in report.runs] == [teacher.texts for teacher in plan.teachers]
    assert bert.hidden[3] == _hidden_payload(bench, "bert", 3)
    assert 0 < bert.hidden[2] < bert.hidden[3]
    done = _dry_run(bench, "dump.layers=[2, 3]")
    assert done.bytes == 0
    assert done.seconds == 0
    assert "bert: nothing is missing" in done.lines()


def test_a_plan_refuses_what_the_dump_would_refuse(bench: Workbench) -> None:
    bench.dump("dump.layers=[2]")
    with pytest.raises(MismatchError, match="dim of layer 2"):
        _dry_run(bench, "dump.layers=[2]", "dump.dim=4")
    with pytest.raises(MismatchError, match="part_size"):
        _dry_run(bench, "dump.layers=[2]", "dump.part_size=8")


def test_it_prints_and_serialises(bench: Workbench) -> None:
    plan = _dry_run(bench, "dump.layers=[2]")
    document = json.loads(json.dumps(plan.as_dict()))
    assert document["texts"] == {"full": 120, "logits_only": 64, "in_cache": 0}
    assert document["teachers"]["bert"]["bytes"]["hidden"].keys() == {"2"}
    assert document["free_bytes"] > 0
    text = "\n".join(plan.lines())
    for expected in (
        "train: 96 rows",
        "120 with hidden states, 64 with logits only",
        "bert: 184 texts",
        "layer 2:",
        "free on the disk",
    ):
        assert expected in text


def test_a_plan_says_how_many_texts_each_teacher_and_the_student_cut_and_the_dump_records_it(bench: Workbench) -> None:
    settings = ("data.max_length=9", "student.max_length=7", "dump.layers=[2]")
    plan = _dry_run(bench, *settings)
    report = bench.dump(*settings)
    cache = open_cache(bench.cache)
    texts = [text for part in cache.parts for text in cache.texts(part.name)]
    records = cache.manifest.provenance["teachers"]
    for teacher, run in zip(plan.teachers, report.runs, strict=True):
        tokenizer = load_teacher(bench.teachers, teacher.teacher).tokenizer
        expected = sum(len(ids) > 9 for ids in tokenizer([text for (text,) in texts])["input_ids"])
        assert 0 < expected < len(texts)
        assert teacher.truncated == run.truncated == records[teacher.teacher]["texts_truncated"] == expected
        assert records[teacher.teacher]["texts_run"] == len(texts)
        share = f"{100 * expected / len(texts):.1f}%"
        assert f"teacher '{teacher.teacher}': {share} of 184 texts have more than 9 tokens and are cut" in "\n".join(
            plan.lines()
        )
        assert share in run.line()
    tokenizer = load_teacher(bench.teachers, "bert").tokenizer  # the student starts from it
    full = [text for part in cache.parts if part.scope == "full" for text in cache.texts(part.name)]
    assert plan.student is not None
    assert plan.student.truncated == sum(len(ids) > 7 for ids in tokenizer([text for (text,) in full])["input_ids"]) > 0
    assert any(line.startswith("student: ") and "more than 7 tokens" in line for line in plan.lines())
    json.dumps(plan.as_dict())


def test_a_student_whose_tokenizer_is_out_of_reach_stops_no_dry_run(bench: Workbench) -> None:
    plan = _dry_run(bench, 'student.init_from="nobody/nothing"', "student.layers=2")
    assert plan.student is not None and "nobody/nothing" in plan.student.reason
    assert any(line.startswith("student: how many texts it truncates is not known") for line in plan.lines())
    assert plan.as_dict()["student"]["texts_truncated"] is None


def test_what_is_cut_is_said_once_with_the_first_part(bench: Workbench) -> None:
    class Notes(SilentProgress):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, message: str) -> None:
            self.lines.append(message)

    notes = Notes()
    only = bench.only("bert")
    dump_teachers(only.recipe("data.max_length=9"), bench.teachers, bench.cache, progress=notes)
    assert (
        len([line for line in notes.lines if line.startswith("teacher 'bert': ") and "more than 9 tokens" in line]) == 1
    )
