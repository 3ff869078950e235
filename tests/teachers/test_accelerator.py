"""Teachers that are trained together on an accelerator, one of them through an adapter.

Their inputs and labels go there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe
from kdcache.teachers.bundle import load_teacher
from kdcache.teachers.cofinetune import cofinetune
from kdcache.testing.accelerator import fake_accelerator, recorded_reads
from kdcache.training import loop


def test_teachers(recipe: Recipe, tmp_path: Path) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        cofinetune(recipe, tmp_path / "here", tmp_path / "work", progress=SilentProgress())
    with fake_accelerator():
        cofinetune(recipe, tmp_path / "there", tmp_path / "other", progress=SilentProgress())
    for name in ("bert", "roberta"):
        found, expected = (load_teacher(tmp_path / place, name).model.state_dict() for place in ("there", "here"))
        torch.testing.assert_close(dict(found), dict(expected), atol=1e-3, rtol=1e-3)


def test_a_step_copies_nothing_from_the_device(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither losses, which are read later, nor whether anything is padding, which transformers asks of plain masks."""
    copies: list[int] = []
    step = loop._Run.step

    def counted(run: loop._Run, batch: object) -> None:
        with recorded_reads() as own:
            step(run, batch)
        copies.append(len(own))

    monkeypatch.setattr(loop._Run, "step", counted)
    with fake_accelerator():
        cofinetune(recipe, tmp_path / "teachers", tmp_path / "work", progress=SilentProgress())
    assert copies == [0] * 6
