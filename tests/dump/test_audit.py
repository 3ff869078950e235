"""The audit on caches that are right, and on caches that were written wrongly and pass every digest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cache.reader import open_cache
from kdcache.cache.tokens import Outputs
from kdcache.cache.verify import verify
from kdcache.codecs.base import HiddenBlock
from kdcache.dump.audit import AuditReport, audit
from kdcache.dump.engine import PartRun, TextBatches
from kdcache.errors import MismatchError
from kdcache.progress import SilentProgress
from kdcache.teachers.backends.torch_backend import TorchBackend
from kdcache.testing.teachers import make_teachers
from tests.dump.conftest import Workbench

FORMS = {
    "int8": ["dump.layers=[2, 4]"],
    "float16": ["dump.layers=[2]", "dump.projection=none", "dump.dtype=float16"],
    "random": ["dump.layers=[2]", "dump.projection=random", "dump.dtype=float32"],
    "coded": ["dump.layers=[2, 4]", "dump.dtype=coded", "dump.bytes=6"],
    "mixed": [
        "dump.layers=[2, 4]", "dump.per_layer.2={tokens='first'}",
        "dump.per_layer.4={dtype='coded', bytes=4, tokens='pooled'}",
    ],
}  # fmt: skip


def _audit(bench: Workbench, teachers: Path | None = None, rows: int = 60) -> AuditReport:
    return audit(open_cache(bench.cache), teachers or bench.teachers, rows=rows, progress=SilentProgress())


def _found(report: AuditReport, teacher: str) -> dict[str, str]:
    return {finding.component: finding.message for finding in report.findings if finding.teacher == teacher}


@pytest.mark.parametrize("form", FORMS)
def test_a_right_cache_agrees(bench: Workbench, form: str) -> None:
    bench.dump(*FORMS[form])
    report = _audit(bench)
    assert report.findings == []
    assert report.not_audited == ()
    for teacher in report.teachers:
        assert 55 <= teacher.texts <= 65
        assert {"logits", "layer 2"} <= teacher.worst.keys()
        assert ("tokens" in teacher.worst) == (form != "mixed")
        assert all(0 <= worst <= 1 for worst in teacher.worst.values())
        assert teacher.tolerance is not None and teacher.tolerance.hidden < 0.01


def test_a_cache_of_other_weights(bench: Workbench, tmp_path: Path) -> None:
    bench.dump("dump.layers=[2]")
    families = {"bert": "bert", "roberta": "roberta", "xlm": "xlm-roberta"}
    others = make_teachers(tmp_path / "others", families, widths={"roberta": 24}, own_heads=["xlm"], seed=5)  # type: ignore[arg-type]
    report = _audit(bench, others)
    for name in families:
        assert {"weights", "logits", "layer 2"} <= _found(report, name).keys()
        worst = next(finding for finding in report.findings if finding.component == "layer 2")
        assert worst.rows[0].times_allowed is not None and worst.rows[0].times_allowed > 2
        assert len(worst.rows[0].text_id) == 32


@pytest.mark.parametrize("form", ["int8", "coded"])
def test_a_wrong_layer_is_named(bench: Workbench, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    ran = TorchBackend.run

    def apart(self: TorchBackend, inputs: dict[str, Any], layers: tuple[int, ...], pooled: bool) -> Any:
        output = ran(self, inputs, layers, pooled)  # layers of a random model are alike: their dimensions are turned
        return replace(output, hidden={layer: states.roll(layer, 1) for layer, states in output.hidden.items()})

    def two_too_low(self: TorchBackend, inputs: dict[str, Any], layers: tuple[int, ...], pooled: bool) -> Any:
        output = apart(self, inputs, tuple(layer - 2 for layer in layers), pooled)
        return replace(output, hidden={layer: output.hidden[layer - 2] for layer in layers})

    monkeypatch.setattr(TorchBackend, "run", two_too_low)
    bench.only("bert").dump(*FORMS[form])
    monkeypatch.setattr(TorchBackend, "run", apart)
    assert verify(bench.cache) == []
    found = _found(_audit(bench), "bert")
    assert found.keys() == {"layer 2", "layer 4"}
    assert found["layer 2"].endswith("what is stored there is layer 0")
    assert found["layer 4"].endswith("what is stored there is layer 2")


def _dump_changed(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, change: Callable[[Outputs, dict[int, HiddenBlock]], Any]
) -> None:
    results = PartRun.results
    monkeypatch.setattr(PartRun, "results", lambda self: change(*results(self)))
    bench.only("bert").dump("dump.layers=[2]")
    monkeypatch.undo()
    assert verify(bench.cache) == []


def _rolled(block: HiddenBlock) -> HiddenBlock:
    return HiddenBlock(np.roll(block.values, 1, axis=0), None if block.scales is None else np.roll(block.scales, 1))


def test_states_that_are_shifted(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    _dump_changed(
        bench,
        monkeypatch,
        lambda outputs, hidden: (outputs, {layer: _rolled(block) for layer, block in hidden.items()}),
    )
    found = _found(_audit(bench), "bert")
    assert found.keys() == {"layer 2"}
    assert found["layer 2"].endswith("its rows are shifted by one token")


def test_logits_that_are_shifted(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    _dump_changed(bench, monkeypatch, lambda outputs, hidden: (Outputs(np.roll(outputs.logits, 1, axis=0)), hidden))
    assert _found(_audit(bench), "bert").keys() == {"logits"}


def test_one_wrong_text_is_found_when_it_is_looked_at(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(outputs: Outputs, hidden: dict[int, HiddenBlock]) -> Any:
        outputs.logits[0] += 0.1
        return outputs, hidden

    _dump_changed(bench, monkeypatch, change)
    report = _audit(bench, rows=1000)
    (finding,) = report.findings
    assert {(row.part, row.row) for row in finding.rows} == {(part.name, 0) for part in open_cache(bench.cache).parts}


def test_spans_that_are_shifted(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = TextBatches.tokens
    monkeypatch.setattr(TextBatches, "tokens", lambda self: replace(tokens(self), ends=tokens(self).ends + 1))
    bench.only("bert").dump("dump.layers=[2]")
    monkeypatch.undo()
    assert verify(bench.cache) == []
    report = _audit(bench)
    assert _found(report, "bert").keys() == {"tokens"}
    assert report.as_dict()["agrees"] is False


def test_teachers_that_are_not_there(bench: Workbench, tmp_path: Path) -> None:
    bench.dump("dump.layers=none")
    some = make_teachers(tmp_path / "some", {"roberta": "roberta"}, widths={"roberta": 24})
    assert _audit(bench, some).not_audited == ("bert", "xlm")
    none = make_teachers(tmp_path / "none", {"other": "bert"})
    with pytest.raises(MismatchError, match="none of the teachers"):
        _audit(bench, none)
    three = make_teachers(tmp_path / "three", {"roberta": "roberta"}, label_names=("a", "b", "c"))
    with pytest.raises(MismatchError, match="the labels of the teachers are"):
        _audit(bench, three)
