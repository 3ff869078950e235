"""Which process holds which teacher; whole trainings are in ``tests/test_several_processes.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.data.task import load_task
from kdcache.errors import MismatchError, RecipeError
from kdcache.recipe import Recipe, TeacherSection, dump_toml
from kdcache.runs import stage_inputs
from kdcache.teachers import joint, placement
from kdcache.teachers.head import SharedHead
from kdcache.teachers.placement import place
from kdcache.teachers.sources import under_shared_head
from kdcache.teachers.teacher import count_parameters, load_encoder
from kdcache.training.processes import ALONE
from tests.training.threads import in_threads


def sections(sizes: dict[str, int], own: tuple[str, ...] = ()) -> list[TeacherSection]:
    return [
        TeacherSection(name=name, model=str(size), head="own" if name in own else "shared")
        for name, size in sizes.items()
    ]


@pytest.fixture
def _sizes_are_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "count_parameters", lambda model, *_args, **_named: int(model))


@pytest.mark.usefixtures("_sizes_are_names")
@pytest.mark.parametrize(
    ("sizes", "own", "world", "expected"),
    [
        ({"a": 1, "b": 5, "c": 2}, (), 2, {"a": 1, "b": 0, "c": 1}),
        ({"a": 3, "b": 3, "c": 3}, (), 3, {"a": 0, "b": 1, "c": 2}),
        ({"a": 9, "b": 5, "c": 4, "d": 3}, (), 2, {"a": 0, "b": 1, "c": 1, "d": 0}),
        ({"a": 1, "b": 1, "c": 9, "d": 1}, ("c",), 2, {"a": 0, "b": 1, "c": 1, "d": 0}),  # each has one to train
        ({"a": 1, "b": 1, "c": 2}, ("c",), 2, {"a": 0, "b": 1, "c": 0}),
    ],
)
def test_teachers_are_spread_by_their_parameters(
    sizes: dict[str, int], own: tuple[str, ...], world: int, expected: dict[str, int]
) -> None:
    found = in_threads(world, lambda processes: place(sections(sizes, own), "teacher", processes))
    assert found == [expected] * world
    assert all(list(ranks) == list(sizes) for ranks in found)


def test_rows_are_shared_unless_it_is_asked_for() -> None:
    every = sections({"a": 1, "b": 5})
    assert place(every, "teacher", ALONE) is None
    assert in_threads(2, lambda processes: place(every, None, processes)) == [None, None]


def test_more_processes_than_teachers_to_train_are_refused() -> None:
    def refused(processes: Any) -> str:
        with pytest.raises(RecipeError) as caught:
            place(sections({"a": 1, "b": 5, "c": 3}, own=("b", "c")), "teacher", processes)
        return f"{caught.value.message}; {caught.value.hint}"

    assert (
        in_threads(2, refused)
        == [
            "cofinetune.placement is 'teacher', and there are 2 processes for 1 teacher to train; "
            "Start at most 1, or let them share rows: --set cofinetune.placement=rows"
        ]
        * 2
    )


def test_processes_with_other_recipes_are_told() -> None:
    def refused(processes: Any) -> None:
        with pytest.raises(
            MismatchError, match=r"differ in 'cofinetune\.placement': (rows in process 0|teacher in process 1)"
        ):
            place(sections({"a": 1, "b": 1}), "teacher" if processes.rank else None, processes)

    in_threads(2, refused)


def test_parameters_are_counted_without_weights(shallow_models: dict[str, Path]) -> None:
    for model in shallow_models.values():
        (counted, loaded) = count_parameters(str(model)), load_encoder(str(model))
        without_pooler = sum(one.numel() for name, one in loaded.named_parameters() if "pooler" not in name)
        assert without_pooler <= counted <= 1.1 * without_pooler  # the encoder alone may be made with its pooler


def test_a_process_draws_the_adapters_that_one_process_draws(shallow_models: dict[str, Path]) -> None:
    widths = {"bert": 16, "roberta": 24, "distilbert": 16}

    class Loaded:
        def __init__(self, name: str) -> None:
            self.network, self.width = load_encoder(str(shallow_models[name])), widths[name]

    def adapters(names: list[str], given: dict[str, int] | None) -> dict[str, Any]:
        torch.manual_seed(3)
        sources: Any = {name: Loaded(name) for name in names}
        return {name: model.adapter for name, model in under_shared_head(sources, SharedHead(24, 2), given).items()}

    every = adapters(list(widths), None)
    for name in widths:
        (own,) = adapters([name], widths).items()
        assert own[0] == name
        assert own[1] is every[name] is None or torch.equal(own[1].weight, every[name].weight)


def test_where_teachers_are_is_no_part_of_what_they_are(recipe: Recipe) -> None:
    """Teachers and checkpoints of either placement, and of versions without the key, are the same."""
    changed = recipe.cofinetune.model_copy(update={"placement": "teacher"})
    apart = recipe.model_copy(update={"cofinetune": changed})
    task = load_task(recipe.data)
    assert joint.identity(apart, task, {}) == joint.identity(recipe, task, {})
    assert "cofinetune.placement" not in joint.identity(apart, task, {})
    assert stage_inputs(apart, "teachers") == stage_inputs(recipe, "teachers")
    rows = Recipe.model_validate(
        {**recipe.model_dump(), "cofinetune": {**recipe.cofinetune.model_dump(), "placement": "rows"}}
    )
    assert rows == recipe
    assert "placement" not in dump_toml(recipe)
    assert 'placement = "teacher"' in dump_toml(apart)
