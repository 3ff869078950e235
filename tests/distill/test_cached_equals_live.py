"""Cached targets give the losses that live teachers give, step by step, for every method of the table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdcache.distill.setup import prepare
from kdcache.distill.stage import DistillTask, distill
from kdcache.dump.stage import dump_teachers
from kdcache.methods.base import Moment
from kdcache.methods.registry import method_names
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe
from kdcache.training.best_epoch import BestEpoch
from tests.conftest import TinyRun

# Correlations with the outputs of a new student, which hardly vary from row to row, amplify rounding from step to step.
AMPLIFIES_ROUNDING = ("dist",)
CASES = [
    *([f"distill.method={name}"] for name in method_names() if name not in AMPLIFIES_ROUNDING),
    ["distill.paper=true"],
    ["distill.temperature=2.0", 'distill.teachers=["xlm", "roberta"]'],
    ["distill.accumulation=2"],
    ["distill.layer_map=last"],
    ["distill.hidden_direction=both"],
]


def losses(recipe: Recipe, run: TinyRun, cache: Path, live: bool, place: Path) -> Iterator[dict[str, float]]:
    """Every loss term of every step of one epoch, with plain SGD updates in between."""
    training = prepare(recipe, cache, place, run.teachers if live else None, progress=SilentProgress())
    model = training.model().train()
    task = DistillTask(
        model, training.source, None, BestEpoch(place, place, {}), epochs=1, accumulation=recipe.distill.accumulation
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in task.batches(0, 0):
        terms: dict[str, float] = {}
        for loss, parts in task.losses(batch):
            loss.backward()
            for name, value in {"loss": loss, **parts}.items():
                terms[name] = terms.get(name, 0.0) + torch.as_tensor(value).item()
        optimizer.step()
        optimizer.zero_grad()
        yield terms


@pytest.mark.parametrize("overrides", CASES, ids=[" ".join(case) for case in CASES])
def test_loss_terms_agree_in_every_step(tiny_run: TinyRun, tmp_path: Path, overrides: list[str]) -> None:
    recipe = tiny_run.recipe(
        *overrides, "distill.dropout=0.0", "distill.student_scores={bert=0.8, roberta=0.7, xlm=0.75}"
    )
    cached = list(losses(recipe, tiny_run, tiny_run.exact, False, tmp_path))
    live = list(losses(recipe, tiny_run, tiny_run.exact, True, tmp_path))
    assert len(cached) == (6 if "distill.method=fine-tune" in overrides else 8)
    for step, (ours, theirs) in enumerate(zip(cached, live, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5), step


def test_live_teachers_cut_texts_where_the_dump_did(tiny_run: TinyRun, tmp_path: Path) -> None:
    shorter = ("teachers.bert.max_length=5", "teachers.roberta.max_length=7", "distill.dropout=0.0")
    start = f'student.init_from="{tiny_run.teachers / "bert"}"'
    recipe = tiny_run.recipe(*shorter, start, "dump.projection=none", "dump.dtype=float32")
    dump_teachers(recipe, tiny_run.teachers, tmp_path / "cache", progress=SilentProgress())
    cached = list(losses(recipe, tiny_run, tmp_path / "cache", False, tmp_path))
    live = list(losses(recipe, tiny_run, tmp_path / "cache", True, tmp_path))
    for step, (ours, theirs) in enumerate(zip(cached, live, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5), step
    assert cached[0] != pytest.approx(next(losses(recipe, tiny_run, tiny_run.exact, False, tmp_path)), rel=1e-5)


@pytest.mark.parametrize("name", AMPLIFIES_ROUNDING)
def test_loss_terms_and_gradients_agree_at_equal_weights(tiny_run: TinyRun, tmp_path: Path, name: str) -> None:
    recipe = tiny_run.recipe(f"distill.method={name}", "distill.dropout=0.0")
    cached = prepare(recipe, tiny_run.exact, tmp_path, None, progress=SilentProgress())
    live = prepare(recipe, tiny_run.exact, tmp_path, tiny_run.teachers, progress=SilentProgress())
    model, steps = cached.model().train(), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step, batches in enumerate(zip(cached.source.batches(0), live.source.batches(0), strict=True)):
        found = []
        for batch in batches:
            model.zero_grad()
            loss, terms = model(batch, model.counts([batch]), Moment(step, 8))
            loss.backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            found.append(({"loss": loss.item()} | {key: value.item() for key, value in terms.items()}, gradients))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5), step
        assert (found[0][1] - found[1][1]).norm() <= 1e-3 * found[1][1].norm()
        optimizer.step()
        steps += 1
    assert steps == 8


def test_projected_and_quantised_targets_stay_close(tiny_run: TinyRun, tmp_path: Path) -> None:
    """PCA in int8 against live teachers through the same basis: what quantisation alone costs."""
    recipe = tiny_run.recipe("distill.dropout=0.0")
    cached = list(losses(recipe, tiny_run, tiny_run.cache, False, tmp_path))
    live = list(losses(recipe, tiny_run, tiny_run.cache, True, tmp_path))
    for ours, theirs in zip(cached, live, strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)


FORMS = {
    "coded": ["dump.dtype=coded", "dump.bytes=6"],
    "first": ["dump.tokens=first", "dump.dtype=float32"],
    "pooled": ["dump.tokens=pooled", "dump.dtype=float32"],
    "mixed": [  # per layer and per teacher: tokens in full, a coded mean, a first token
        "dump.dtype=float32", 'dump.per_layer.last={dtype="coded", bytes=4, tokens="pooled"}',
        'teachers.bert.per_layer.2={tokens="first"}',
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_targets_of_every_form_agree_in_every_step(tiny_run: TinyRun, tmp_path: Path, form: str) -> None:
    cache = tiny_run.cache.with_name(f"cache-{form}")  # beside the teachers
    dump_teachers(tiny_run.recipe(*FORMS[form]), tiny_run.teachers, cache, progress=SilentProgress())
    for overrides in (["distill.accumulation=2"], ["distill.hidden_direction=teacher-to-student"]):
        recipe = tiny_run.recipe(
            "distill.dropout=0.0", "distill.weights.hidden=1e-5", *overrides
        )  # first tokens hardly vary here
        cached = list(losses(recipe, tiny_run, cache, False, tmp_path))
        live = list(losses(recipe, tiny_run, cache, True, tmp_path))
        assert len(cached) == 8
        assert any(name.startswith("hidden/") for name in cached[0])
        for step, (ours, theirs) in enumerate(zip(cached, live, strict=True)):
            assert ours == pytest.approx(theirs, rel=1e-5), step


BESIDE = {  # transfer texts with logits only, beside the others: every form of targets
    "tokens": (["dump.projection=none", "dump.dtype=float32"], ["distill.method=mt-bert"]),
    "paper": (["dump.projection=none", "dump.dtype=float32"], ["distill.paper=true", "distill.accumulation=3"]),
    "pkd": (["dump.projection=none", "dump.dtype=float32"], ["distill.method=pkd", "distill.accumulation=2"]),
    "rkd": (["dump.projection=none", "dump.dtype=float32"], ["distill.method=rkd"]),
    "kd": (["dump.projection=none", "dump.dtype=float32"], ["distill.method=kd"]),
    **{
        name: (overrides, ["distill.accumulation=2", "distill.weights.hidden=1e-5"])
        for name, overrides in FORMS.items()
    },
}


@pytest.mark.parametrize("form", BESIDE)
def test_texts_with_logits_only_beside_others(tiny_run: TinyRun, tmp_path: Path, form: str) -> None:
    stored, overrides = BESIDE[form]
    cache = tiny_run.cache.with_name("cache-beside-" + ("exact" if form not in FORMS else form))
    dump_teachers(
        tiny_run.recipe(*stored, "dump.hidden_transfer=6"), tiny_run.teachers, cache, progress=SilentProgress()
    )
    recipe = tiny_run.recipe("distill.dropout=0.0", *overrides)
    cached = list(losses(recipe, tiny_run, cache, False, tmp_path))
    live = list(losses(recipe, tiny_run, cache, True, tmp_path))
    assert len(cached) == (7 if form == "rkd" else 8)
    assert any(name.startswith("hidden/") for name in cached[0]) == (form != "kd")
    for step, (ours, theirs) in enumerate(zip(cached, live, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5), step


def test_a_step_without_hidden_states_has_no_hidden_loss(tiny_run: TinyRun, tmp_path: Path) -> None:
    """One row at a time: rows with logits only add soft losses, and leave the projections as they are."""
    cache = tiny_run.cache.with_name("cache-beside-exact")
    exact = tiny_run.recipe("dump.projection=none", "dump.dtype=float32", "dump.hidden_transfer=6")
    dump_teachers(exact, tiny_run.teachers, cache, progress=SilentProgress())
    recipe = tiny_run.recipe("distill.dropout=0.0", "distill.batch_size=1")
    found = list(losses(recipe, tiny_run, cache, False, tmp_path))
    without = [terms for terms in found if terms["hidden"] == 0.0]
    assert (len(found), len(without)) == (120, 18)
    assert all(terms["task"] == 0.0 and terms["loss"] == pytest.approx(terms["soft"]) for terms in without)


def test_layers_that_change_from_epoch_to_epoch(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Two epochs of a random layer map; a training that goes on in the second one draws the same layers."""
    cache = tiny_run.cache.with_name("cache-every-layer")
    every = tiny_run.recipe(
        "dump.layers=[1, 2, 3, 4]", "teachers.xlm.layers=[2, 4]", "dump.projection=none", "dump.dtype=float32"
    )
    dump_teachers(every, tiny_run.teachers, cache, progress=SilentProgress())
    recipe = tiny_run.recipe("distill.dropout=0.0", "distill.layer_map=random", "distill.seed=3")
    cached = prepare(recipe, cache, tmp_path, None, progress=SilentProgress())
    live = prepare(recipe, cache, tmp_path, tiny_run.teachers, progress=SilentProgress())
    maps = [cached.source.layers_at(epoch) for epoch in range(6)]
    assert maps == [live.source.layers_at(epoch) for epoch in range(6)]
    assert len({layers["bert"] for layers in maps}) > 1
    for epoch in (0, 1):
        counts = []
        for source in (cached.source, live.source):
            batch = next(iter(source.batches(epoch)))
            assert batch.targets is not None
            model = cached.model()
            loss, terms = model(batch, model.counts([batch]), Moment(8 * epoch, 16, epoch))
            counts.append({"loss": loss.item()} | {name: value.item() for name, value in terms.items()})
        assert counts[0] == pytest.approx(counts[1], rel=1e-5)


def test_the_stage_runs_with_live_teachers(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe("distill.dropout=0.0")
    live = distill(
        recipe, tiny_run.exact, tmp_path / "live", live_teachers=tiny_run.teachers, progress=SilentProgress()
    )
    cached = distill(recipe, tiny_run.exact, tmp_path / "cached", progress=SilentProgress())
    assert (live.results["targets"], cached.results["targets"]) == ("live", "cache")
    assert live.scores["test"]["loss"] == pytest.approx(cached.scores["test"]["loss"], rel=1e-3)
