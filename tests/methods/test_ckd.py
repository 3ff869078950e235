"""Contextual KD against its formula in a loop: words of a text, and layers of a word."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdcache.distill.setup import prepare
from kdcache.loading.targets import Hidden
from kdcache.methods.base import Moment, StepCounts, View
from kdcache.methods.ckd import ContextualRelations, relations
from kdcache.progress import SilentProgress
from kdcache.testing.method_contract import GoldenMethod, PlainStep, Vector, huber, mean, plain_setup, settings_of
from kdcache.testing.steps import ROWS, loop_model, step_batch, step_loss
from tests.conftest import TinyRun

Group = dict[int, tuple[Vector, Vector]]  # place -> (student, teacher)


def squared_distances(vectors: dict[int, Vector]) -> dict[tuple[int, int], float]:
    """Of pairs of different places, divided by their mean."""
    found = {(i, j): math.dist(vectors[i], vectors[j]) ** 2 for i, j in itertools.permutations(vectors, 2)}
    return {pair: value / mean(list(found.values())) for pair, value in found.items()}


def angle(i: Vector, j: Vector, k: Vector) -> float:
    """Cosine at j."""
    a, b = ([x - y for x, y in zip(side, j, strict=True)] for side in (i, k))
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def related(group: Group, window: int = 99) -> float:
    sides = [{place: both[side] for place, both in group.items()} for side in (0, 1)]
    ours, theirs = (squared_distances(vectors) for vectors in sides)
    pairs = mean([huber(ours[pair], theirs[pair]) for pair in ours])
    triples = [
        huber(*(angle(vectors[i], vectors[j], vectors[k]) for vectors in sides))
        for i, j, k in itertools.permutations(group, 3)
        if abs(i - j) <= window and abs(k - j) <= window
    ]
    return pairs + mean(triples)


class TestCkd(GoldenMethod):
    method = "ckd"

    def expected(self, step: PlainStep) -> dict[str, float]:
        words = {}
        for pair in step.targets:
            texts: dict[int, Group] = {}
            for (row, token), theirs in step.targets[pair].items():
                texts.setdefault(row, {})[token] = (step.states[pair[1]][row][token], theirs)
            words[pair] = mean([related(group, window=2) for group in texts.values()])
        soft = step.soft_of([step.mean_probability(row) for row in range(ROWS)])
        return {"task": step.task, "soft": soft, "hidden": step.per_layer(words)}  # two layers: LTR is 0


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 6, 9])
def test_relations_of_groups_with_gaps(window: int | None) -> None:
    generator = torch.Generator().manual_seed(4)
    student = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    teacher = torch.randn(3, 7, 6, generator=generator, dtype=torch.float64)
    valid = torch.tensor([[1.0] * 7, [0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]], dtype=torch.float64)
    found = relations(student, teacher, valid, window)
    for row in range(3):
        places = [place for place in range(7) if valid[row, place]]
        group = {place: (student[row, place].tolist(), teacher[row, place].tolist()) for place in places}
        assert found[row].item() == pytest.approx(related(group, 99 if window is None else window))


def test_layers_of_a_word_are_compared_where_the_teacher_has_them_unprojected() -> None:
    """Three layers, of which the cache holds two of three dimensions; mapped back, they are compared in three."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states, basis, positions = drawn(4, 2, 3, 5), drawn(3, 2, 3), torch.tensor([0, 1, 4])  # [layers, B, L, width]
    targets = {(0, layer): Hidden(drawn(3, 2).float(), None, None, None, None, positions) for layer in (1, 2, 3)}
    setup = replace(plain_setup(), teachers=("a",), unproject=lambda pair, stored: stored.double() @ basis[pair[1] - 1])
    view = View(
        student_logits=drawn(2, 3), student_hidden=list(states), attention_mask=torch.ones(2, 3),
        labels=torch.tensor([0, 1]), text_ids=step_batch().text_ids[:2], teacher_logits=drawn(1, 2, 3),
        hidden_targets=targets, weights=torch.ones(1, 2), factors=(1.0,),
        counts=StepCounts(2, 2, {"hidden": {(0, layer): 2 for layer in (1, 2, 3)}}), moment=Moment(),
    )  # fmt: skip
    log: dict[str, torch.Tensor] = {}
    total = ContextualRelations().bind(setup)(view, log)
    texts: dict[int, list[float]] = {0: [], 1: []}
    for place, position in enumerate(positions.tolist()):
        row, token = divmod(position, 3)
        word = {
            layer: (
                states[layer, row, token].tolist(),
                (targets[0, layer].values[place].double() @ basis[layer - 1]).tolist(),
            )
            for layer in (1, 2, 3)
        }
        texts[row].append(related(word))
    expected = (mean(texts[0]) + mean(texts[1])) / 2
    assert expected > 0.01
    assert log["hidden/layers/a/0"].item() == pytest.approx(expected)
    words = mean([log[f"hidden/a/{layer}"].item() for layer in (1, 2, 3)])
    assert total.item() == pytest.approx(words + expected)


def test_equal_words_have_a_finite_gradient() -> None:
    batch = step_batch()
    batch.inputs["input_ids"][:] = 7
    _, _, gradients = step_loss(loop_model(settings_of("ckd")), batch)
    assert all(bool(gradient.isfinite().all()) and bool(gradient.abs().max() < 100) for gradient in gradients.values())


def test_states_of_a_cache_are_mapped_back_by_the_basis_of_their_layer(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe("distill.method=ckd", "distill.dropout=0.0")
    training = prepare(recipe, tiny_run.cache, tmp_path, None, progress=SilentProgress())
    assert training.cache is not None
    for index, name in enumerate(training.source.teachers):
        for student_layer, layer in enumerate(training.source.layer_map[name], start=1):
            assert layer is not None
            basis = training.cache.basis(name, layer)
            assert basis.components is not None
            assert basis.mean is not None
            stored = torch.randn(3, len(basis.components))
            expected = stored @ torch.from_numpy(basis.components) + torch.from_numpy(basis.mean)
            assert torch.allclose(training.unproject((index, student_layer), stored), expected, atol=1e-5)
    model, batch = training.model(), next(iter(training.source.batches(0)))
    assert torch.isfinite(model(batch, model.counts([batch]))[0])
