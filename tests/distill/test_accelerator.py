"""A student that trains on an accelerator: all that it is given goes there, and it learns what it learns on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify
from kdcache.distill import stage
from kdcache.distill.stage import DistillResult, distill
from kdcache.dump.stage import dump_teachers
from kdcache.loading import transfer
from kdcache.loading.targets import Batch
from kdcache.progress import SilentProgress
from kdcache.students.score import evaluate_model
from kdcache.testing.accelerator import fake_accelerator, recorded_reads, recorded_transfers
from kdcache.training import loop
from tests.conftest import TinyRun

CASES = {
    "mt-bert, in pieces": ["distill.accumulation=2"],
    "kd": ["distill.method=kd"],
    "fine-tune": ["distill.method=fine-tune"],
    "best-teacher": ["distill.method=best-teacher"],
    "weights": ["distill.teacher_weights={bert=0.5,roberta=0.3,xlm=0.2}"],
}


def assert_same(here: DistillResult, there: DistillResult) -> None:
    """With the same kernel of attention on both sides, up to rounding: AdamW has a kernel of its own for the CPU."""
    found, expected = (load_file(one.student / "model.safetensors") for one in (there, here))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_a_student_from_a_cache(tiny_run: TinyRun, tmp_path: Path, overrides: list[str]) -> None:
    recipe = tiny_run.recipe(*overrides, "distill.dropout=0.0")
    with sdpa_kernel(SDPBackend.MATH):
        here = distill(recipe, tiny_run.cache, tmp_path / "here", progress=SilentProgress())
    with fake_accelerator():
        there = distill(recipe, tiny_run.cache, tmp_path / "there", progress=SilentProgress())
        score = evaluate_model(there.student, str(tiny_run.recipe().data.validation))
    assert_same(here, there)
    assert score["accuracy"] == there.scores["validation"]["accuracy"]


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_kdcache_copies_nothing_from_the_device_until_losses_are_read(
    tiny_run: TinyRun, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_READ_STEPS", 3)
    copies: list[list[str]] = []
    step = loop._Run.step

    def counted(run: loop._Run, batch: object) -> None:
        with recorded_reads() as own:
            step(run, batch)
        copies.append(own)

    monkeypatch.setattr(loop._Run, "step", counted)
    with fake_accelerator():
        distill(tiny_run.recipe(*overrides), tiny_run.cache, tmp_path, progress=SilentProgress())
    assert len(copies) >= 6
    assert [len(own) for own in copies[:6]] == [0, 0, 1, 0, 0, 1]
    assert copies[2][-1] == "aten._to_copy.default"


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_a_step_is_copied_to_the_device_at_once(
    tiny_run: TinyRun, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy per optimizer step, before it, and none while it runs."""
    inside: list[list[int]] = []
    step, steps = loop._Run.step, transfer.on_device
    prepared: list[int] = []

    def counted(run: loop._Run, batch: object) -> None:
        with recorded_transfers() as own:
            step(run, batch)
        inside.append(own)

    def to(packed: transfer.PackedBatches, device: torch.device) -> tuple[Batch, ...]:
        with recorded_transfers() as own:
            moved = move(packed, device)
        prepared.append(len(own))
        return moved

    move = transfer.PackedBatches.to
    monkeypatch.setattr(transfer.PackedBatches, "to", to)
    monkeypatch.setattr(loop._Run, "step", counted)
    monkeypatch.setattr(stage, "on_device", lambda made, device, **_: steps(made, device, in_thread=False))
    recipe = tiny_run.recipe(*overrides)
    with fake_accelerator():
        distill(recipe, tiny_run.cache, tmp_path, progress=SilentProgress())
    assert prepared == [1] * len(inside)
    assert inside == [[]] * len(prepared)


def test_a_student_of_live_teachers(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe("distill.dropout=0.0")
    with sdpa_kernel(SDPBackend.MATH):
        here = distill(
            recipe, tiny_run.cache, tmp_path / "here", live_teachers=tiny_run.teachers, progress=SilentProgress()
        )
    with fake_accelerator():
        there = distill(
            recipe, tiny_run.cache, tmp_path / "there", live_teachers=tiny_run.teachers, progress=SilentProgress()
        )
    assert_same(here, there)


def test_a_dump(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Coded, since codes are searched on the device."""
    with fake_accelerator():
        dump_teachers(
            tiny_run.recipe("dump.dtype=coded", "dump.bytes=4"), tiny_run.teachers, tmp_path, progress=SilentProgress()
        )
    assert verify(tmp_path) == []
    found, expected = open_cache(tmp_path), open_cache(tiny_run.cache)
    for teacher in found.teachers:
        for part in found.parts:
            np.testing.assert_allclose(
                found.outputs(teacher, part.name).logits,
                expected.outputs(teacher, part.name).logits,
                atol=1e-4,
                rtol=1e-4,
            )
