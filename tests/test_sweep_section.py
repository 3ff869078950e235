"""The section [sweep]: what may vary, how cells are written, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.errors import RecipeError
from kdcache.recipe import Recipe, load_recipe
from kdcache.recipe.number_keys import is_known_key, number_type

RECIPE = """
name = "small"
[data]
train = "train.tsv"
validation = "dev.tsv"
text = ["sentence"]
label = "label"
[[teachers]]
name = "bert"
model = "google-bert/bert-base-uncased"
[student]
init_from = "teacher:bert"
"""


def load(directory: Path, section: str) -> Recipe:
    path = directory / "recipe.toml"
    path.write_text(RECIPE + section, encoding="utf-8")
    return load_recipe(path)


def test_cells_are_the_baseline_the_list_and_every_combination_of_the_grid(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
[sweep]
baseline = { distill.method = "fine-tune" }
cells = [ {}, { "distill.weights.hidden" = 0.0, cache = "other" } ]
seeds = [4, 2]
[sweep.grid]
distill.method = ["kd", "mt-bert"]
"student.layers" = [2, [1, 3]]
""",
    )
    assert recipe.sweep is not None
    assert recipe.sweep.seeds == [4, 2]
    assert recipe.sweep.settings() == [
        {"distill.method": "fine-tune"},
        {},
        {"distill.weights.hidden": 0.0, "cache": "other"},
        {"distill.method": "kd", "student.layers": 2},
        {"distill.method": "kd", "student.layers": [1, 3]},
        {"distill.method": "mt-bert", "student.layers": 2},
        {"distill.method": "mt-bert", "student.layers": [1, 3]},
    ]


def test_nested_tables_are_dotted_keys_and_quoted_keys_keep_their_tables(tmp_path: Path) -> None:
    section = '[[sweep.cells]]\ndistill.teacher_layers.bert = [2, 4]\n[[sweep.cells]]\n"distill.weights" = {hidden = 1}'
    recipe = load(tmp_path, section)
    assert recipe.sweep is not None
    assert recipe.sweep.cells == [{"distill.teacher_layers.bert": [2, 4]}, {"distill.weights": {"hidden": 1}}]


def test_keys_beside_a_table_that_does_not_hold_them_are_no_conflict(tmp_path: Path) -> None:
    section = """
[sweep]
cells = [{ "distill.teacher_weights" = { bert = 1 }, distill.teachers = ["bert"], distill.weights = { hidden = 1 } }]
grid = { "distill.weights" = [{ soft = 1.0 }, { soft = 2.0 }], distill.weights.hidden = [0, 1] }
"""
    recipe = load(tmp_path, section)
    assert recipe.sweep is not None
    (cell, *combinations) = recipe.sweep.settings()
    assert cell == {"distill.teacher_weights": {"bert": 1}, "distill.teachers": ["bert"], "distill.weights.hidden": 1}
    assert len(combinations) == 4


@pytest.mark.parametrize(
    ("key", "known", "number"),
    [
        ("distill.epochs", True, int),
        ("distill.stages.2.batch_size", True, int),
        ("student.layers", True, int),
        ("distill.weights.hidden", True, float),
        ("distill.ema", True, float),
        ("distill.teacher_weights.bert", True, float),
        ("distill.stages.1.weights.soft", True, float),
        ("student.config.hidden_size", True, None),
        ("distill.method", True, None),
        ("distill.weights.hiden", False, None),
    ],
)
def test_the_numbers_of_a_key_are_those_of_its_type(key: str, known: bool, number: type | None) -> None:
    assert (is_known_key(key), number_type(key)) == (known, number)


def test_a_range_is_a_value_of_a_search(tmp_path: Path) -> None:
    section = "[sweep.search]\ntrials = 3\n[sweep.search.space]\ndistill.learning_rate = { low = 1e-5, high = 1e-3 }"
    recipe = load(tmp_path, section + "\nstudent.layers = [1, 2]")
    assert recipe.sweep is not None
    assert recipe.sweep.search is not None
    assert list(recipe.sweep.search.space) == ["distill.learning_rate", "student.layers"]


def test_a_recipe_without_the_section_has_no_sweep(tmp_path: Path) -> None:
    assert load(tmp_path, "").sweep is None


@pytest.mark.parametrize(
    "key", ["data.train", "data.labels", "teachers.bert.model", "cofinetune.epochs", "dump.dim", "dump"]
)
@pytest.mark.parametrize("table", ["grid = {{ '{}' = [1] }}", "cells = [{{ '{}' = 1 }}]"])
def test_keys_that_change_the_cache_are_refused_by_name(tmp_path: Path, key: str, table: str) -> None:
    with pytest.raises(RecipeError, match=rf"'{key}' cannot vary in a sweep, because it changes what the cache holds"):
        load(tmp_path, "[sweep]\n" + table.format(key))


@pytest.mark.parametrize("key", ["data.transfer", "data.transfer_rows", "cache", "distill.teachers", "student.layers"])
def test_keys_of_students_may_vary(tmp_path: Path, key: str) -> None:
    assert load(tmp_path, f"[sweep]\ngrid = {{ '{key}' = [1] }}").sweep is not None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("grid = { distill.seed = [1] }", "'distill.seed' cannot vary in a sweep: set sweep.seeds"),
        ("grid = { name = ['a'] }", "'name' cannot vary in a sweep"),
        ("cells = [{ student = 1 }]", "'student' cannot vary in a sweep; keys of distill and student can"),
        ("grid = { distill.method = 'kd' }", 'sweep.grid.distill.method is "kd"; a list, in brackets, was expected'),
        ("grid = { distill.method = [] }", "'distill.method' has no values"),
        ("cells = [{ 'distill.method' = 'kd', distill.method = 'mt-bert' }]", "'distill.method' is given twice"),
        ("grid = { 'distill.method' = ['kd'], distill.method = ['mt-bert'] }", "'distill.method' is given twice"),
        (
            "baseline = { 'distill.weights' = { soft = 1 }, distill.weights.hidden = 1 }",
            "'distill.weights.hidden' is a part of 'distill.weights', and both are given",
        ),
        (
            "cells = [{ distill.weights.hidden = 1, 'distill.weights' = { soft = 1 } }]",
            "'distill.weights.hidden' is a part of 'distill.weights', and both are given",
        ),
        ("grid = { distill.weights.hidden = [1], 'distill.weights' = [{soft = 1}] }", "is a part of 'distill.weights'"),
        ("", "give cells, a grid or a search"),
        ("cells = [{}]\nseeds = [1, 1]", r"each seed may be given once: \[1, 1\]"),
        ("cells = [{}]\nseed = 1", "unknown key 'sweep.seed'"),
        ("search = { trials = 2, space = { distill.epochs = { low = 2, high = 2 } } }", "high must be the larger one"),
        ("search = { trials = 2, space = { distill.epochs = { low = 0, high = 2, log = true } } }", "more than 0"),
        ("search = { trials = 2, space = { distill.epochs = [] } }", "'distill.epochs' has no values"),
        ("search = { trials = 2, space = { dump.dim = [2] } }", "'dump.dim' cannot vary in a sweep"),
    ],
)
def test_what_is_refused(tmp_path: Path, section: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load(tmp_path, f"[sweep]\n{section}")
    assert caught.value.exit_code == 2


def test_values_are_set_as_with_set_and_refused_in_the_same_words(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    values = {"distill.method": "kd", "student.layers": [1, 3], "distill.weights": {"hidden": 2.0}}
    by_value = load_recipe(path, ["distill.epochs=5"], values)
    by_text = load_recipe(
        path, ["distill.epochs=5", "distill.method=kd", "student.layers=[1, 3]", "distill.weights={hidden = 2.0}"]
    )
    assert by_value == by_text
    with pytest.raises(RecipeError, match=r"unknown key 'distill\.methods'") as caught:
        load_recipe(path, [], {"distill.methods": "kd"})
    assert "Did you mean 'method'?" in caught.value.hint
    with pytest.raises(RecipeError, match="'name' is a value, not a section"):
        load_recipe(path, [], {"name.x": 1})
