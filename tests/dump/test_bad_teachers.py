"""Teachers that give NaN or numbers too large, and disks that are too small: one clear line, and nothing is lost."""

from __future__ import annotations

import re
import shutil
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kdcache.cache.reader import open_cache
from kdcache.data.task import load_task
from kdcache.dump import dry_run as plan
from kdcache.errors import NonFiniteError, StorageError
from kdcache.teachers.bundle import load_teacher
from kdcache.teachers.teacher import TeacherModel
from tests.dump.conftest import Workbench


def _spoil(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[TeacherModel, dict[str, torch.Tensor], object], object]
) -> None:
    """Let the teacher 'roberta' (24 wide) give what ``change`` makes of its forward pass."""
    forward = TeacherModel.forward

    def spoiled(self: TeacherModel, inputs: dict[str, torch.Tensor], *, hidden_states: bool = False) -> object:
        output = forward(self, inputs, hidden_states=hidden_states)
        return change(self, inputs, output) if self.encoder.config.hidden_size == 24 else output

    monkeypatch.setattr(TeacherModel, "forward", spoiled)


@dataclass(frozen=True)
class _Victim:
    """A text of train, and how it looks in a batch of the teacher 'roberta'."""

    identity: bytes
    tokens: tuple[int, ...]

    def rows(self, inputs: dict[str, torch.Tensor]) -> list[int]:
        pairs = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].sum(dim=1).tolist(), strict=True)
        return [row for row, (tokens, length) in enumerate(pairs) if tuple(tokens[:length]) == self.tokens]


def _victim(bench: Workbench) -> _Victim:
    task = load_task(bench.recipe().data)
    identity = bytes(task.splits["train"].text_ids[17])
    tokenizer = load_teacher(bench.teachers, "roberta").tokenizer
    return _Victim(identity, tuple(tokenizer(task.texts[identity][0])["input_ids"]))


@pytest.mark.parametrize("sample_texts", [1, 500])
def test_nan_is_named_with_teacher_text_and_layer_and_the_rest_stays(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, sample_texts: int
) -> None:
    victim = _victim(bench)
    settings = (f"dump.sample_texts={sample_texts}", "dump.layers=[2]")

    def spoil(_: TeacherModel, inputs: dict[str, torch.Tensor], output: object) -> object:
        states = getattr(output, "hidden_states", None)
        if states is not None:
            states[2][victim.rows(inputs)] = torch.nan
        return output

    _spoil(monkeypatch, spoil)
    with pytest.raises(
        NonFiniteError, match=rf"teacher 'roberta', text {victim.identity.hex()}, layer 2: NaN"
    ) as caught:
        bench.dump(*settings)
    assert caught.value.hint
    assert caught.value.exit_code == 1
    assert not (bench.cache / "manifest.json").exists()
    monkeypatch.undo()
    report = bench.only("bert", "xlm").dump(*settings)  # without the bad one: the work of bert is there
    assert [run.teacher for run in report.runs] == ["xlm"]
    assert set(open_cache(bench.cache).teachers) == {"bert", "xlm"}


def test_nan_logits_are_named(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = _victim(bench)

    def spoil(_: TeacherModel, inputs: dict[str, torch.Tensor], output: object) -> object:
        output.logits[victim.rows(inputs)] = torch.inf  # type: ignore[attr-defined]
        return output

    _spoil(monkeypatch, spoil)
    with pytest.raises(
        NonFiniteError, match=rf"teacher 'roberta', text {victim.identity.hex()}, logits: NaN or infinity"
    ):
        bench.dump()


def test_numbers_beyond_float16_are_refused_with_the_cure(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(_: TeacherModel, __: dict[str, torch.Tensor], output: object) -> object:
        states = getattr(output, "hidden_states", None)
        if states is not None:
            states[2].mul_(1e6)
        return output

    _spoil(monkeypatch, spoil)
    with pytest.raises(
        NonFiniteError, match=r"teacher 'roberta', text [0-9a-f]{32}, layer 2: .* is beyond float16"
    ) as caught:
        bench.dump("dump.dtype=float16", "dump.projection=none", "dump.layers=[2]")
    assert 'dump.dtype = "int8"' in caught.value.hint
    monkeypatch.undo()
    shutil.rmtree(bench.cache)
    bench.dump("dump.dtype=float16", "dump.projection=none", "dump.layers=[2]")


def test_a_disk_that_is_clearly_too_small_is_said_before_any_teacher_runs(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, forward_passes: Counter[object]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 3000))
    with pytest.raises(
        StorageError, match=r"the dump needs about [0-9.]+ kB, but the disk of '.*' has 3 kB free"
    ) as caught:
        bench.dump()
    assert re.search(r"dump\.dim.*--dry-run", caught.value.hint)
    assert not forward_passes
    monkeypatch.undo()
    bench.dump()


def test_free_space_is_that_of_the_disk_that_the_cache_will_lie_on(tmp_path: Path) -> None:
    assert plan.free_bytes(tmp_path / "not" / "there" / "yet") == pytest.approx(
        shutil.disk_usage(tmp_path).free, rel=0.05
    )
