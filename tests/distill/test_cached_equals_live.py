"""Cached targets give the losses that live teachers give, step by step, for every method of the table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdcache.cache.reader import open_cache
from kdcache.distill.data import student_data
from kdcache.distill.methods import METHODS
from kdcache.distill.objective import DistillationModel, objective_settings
from kdcache.distill.sources import open_source
from kdcache.distill.stage import distill
from kdcache.distill.student import build_student
from kdcache.distill.trainee import DistillTrainee
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe
from tests.distill.conftest import TinyRun

CASES = [
    *(([f"distill.method={name}"]) for name in METHODS),
    ["distill.paper=true"],
    ["distill.temperature=2.0", 'distill.teachers=["xlm", "roberta"]'],
    ["distill.accumulation=2"],
]


def losses(recipe: Recipe, run: TinyRun, cache: Path, live: bool, place: Path) -> Iterator[dict[str, float]]:
    """Every loss term of every step of one epoch, with plain SGD updates in between."""
    opened, settings = open_cache(cache), objective_settings(recipe.distill)
    data = student_data(recipe.data, opened)
    student = build_student(
        recipe.require_student(), data.label_names, max_length=32, seed=0, dropout=0.0, teachers_dir=run.teachers
    )
    source = open_source(recipe.distill, settings, data, student, opened, run.teachers if live else None)
    pairs = {
        (index, layer): (name, own)
        for index, name in enumerate(source.teachers)
        for layer, own in enumerate(source.layer_map.get(name, ()), start=1)
    }
    dims = {pair: source.target_dim(*layer) for pair, layer in pairs.items()}
    variances = {pair: source.target_variance(*layer) for pair, layer in pairs.items()}
    model = DistillationModel(student.model, settings, source.teachers, dims=dims, variances=variances).train()
    trainee = DistillTrainee(model, source, None, place, {}, accumulation=recipe.distill.accumulation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in trainee.batches(0, 0):
        terms: dict[str, float] = {}
        for loss, parts in trainee.losses(batch):
            loss.backward()
            for name, value in {"loss": loss, **parts}.items():
                terms[name] = terms.get(name, 0.0) + torch.as_tensor(value).item()
        optimizer.step()
        optimizer.zero_grad()
        yield terms


@pytest.mark.parametrize("overrides", CASES, ids=[" ".join(case) for case in CASES])
def test_loss_terms_agree_in_every_step(tiny_run: TinyRun, tmp_path: Path, overrides: list[str]) -> None:
    recipe = tiny_run.recipe(*overrides)
    cached = list(losses(recipe, tiny_run, tiny_run.exact, False, tmp_path))
    live = list(losses(recipe, tiny_run, tiny_run.exact, True, tmp_path))
    assert len(cached) == (6 if "distill.method=fine-tune" in overrides else 8)
    for step, (ours, theirs) in enumerate(zip(cached, live, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-4), step


def test_projected_and_quantised_targets_stay_close(tiny_run: TinyRun, tmp_path: Path) -> None:
    """PCA in int8 against live teachers through the same basis: what quantisation alone costs."""
    recipe = tiny_run.recipe()
    cached = list(losses(recipe, tiny_run, tiny_run.cache, False, tmp_path))
    live = list(losses(recipe, tiny_run, tiny_run.cache, True, tmp_path))
    for ours, theirs in zip(cached, live, strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)


def test_the_stage_runs_with_live_teachers(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe("distill.dropout=0.0")
    live = distill(recipe, tiny_run.exact, tmp_path / "live", live_teachers=tiny_run.teachers, progress=SilentProgress())
    cached = distill(recipe, tiny_run.exact, tmp_path / "cached", progress=SilentProgress())
    assert (live.results["targets"], cached.results["targets"]) == ("live", "cache")
    assert live.scores["test"]["loss"] == pytest.approx(cached.scores["test"]["loss"], rel=1e-3)
