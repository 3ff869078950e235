from __future__ import annotations

import json
from collections import Counter

import pytest

from kdcache.cache.reader import open_cache
from kdcache.dump.plan import DumpPlan, plan_dump
from kdcache.errors import MismatchError
from kdcache.progress import SilentProgress
from tests.dump.conftest import Workbench


def _plan(bench: Workbench, *overrides: str) -> DumpPlan:
    return plan_dump(bench.recipe(*overrides), bench.teachers, bench.cache, progress=SilentProgress())


def _hidden_payload(bench: Workbench, teacher: str, layer: int) -> int:
    cache = open_cache(bench.cache)
    blocks = [cache.hidden(teacher, part.name, layer) for part in cache.parts if part.scope == "full"]
    return sum(block.values.nbytes + (0 if block.scales is None else block.scales.nbytes) for block in blocks)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_the_plan_is_what_the_dump_then_writes(bench: Workbench, dtype: str) -> None:
    settings = ("dump.layers=[2, 4]", f"dump.dtype={dtype}")
    plan = _plan(bench, *settings)
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
    plan = _plan(bench, "dump.layers=[2, 3]")
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
    done = _plan(bench, "dump.layers=[2, 3]")
    assert done.bytes == 0
    assert done.seconds == 0
    assert "bert: nothing is missing" in done.lines()


def test_a_plan_refuses_what_the_dump_would_refuse(bench: Workbench) -> None:
    bench.dump("dump.layers=[2]")
    with pytest.raises(MismatchError, match="dim of layer 2"):
        _plan(bench, "dump.layers=[2]", "dump.dim=4")
    with pytest.raises(MismatchError, match="part_size"):
        _plan(bench, "dump.layers=[2]", "dump.part_size=8")


def test_it_prints_and_serialises(bench: Workbench) -> None:
    plan = _plan(bench, "dump.layers=[2]")
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
