"""A written recipe loads and says what was meant, whatever the columns, classes and files are called."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.first.costs import Work, estimate
from kdcache.first.lengths import measure
from kdcache.first.models import LATIN_STUDENT, LATIN_TEACHERS, ModelFacts, plain_name, teacher_names
from kdcache.first.writing import FirstRecipe, Teacher, quoted, recipe_text
from kdcache.recipe import parse_recipe

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20) | st.sampled_from(
    ['a "b"', "'", '"""', "\\", "a\nb", "a\r\n# x = 1", "\x7f", "\x00", "]", "#", "über", "\u2028", "label\n[data]"]
)
FILE = "/no/such/directory/train.tsv"


@settings(max_examples=20)
@given(
    text=st.lists(NAMES, min_size=1, max_size=2, unique=True),
    label=NAMES,
    labels=st.lists(NAMES, min_size=2, unique=True),
)
def test_hostile_names(text: list[str], label: str, labels: list[str]) -> None:
    if label in text:
        return
    teachers = (
        Teacher("a", "org/a", 1e-5, licence=label, remark=f"of {quoted(labels[0])}"),
        Teacher("b", "b", own=True),
    )
    meant = FirstRecipe(
        "x", FILE, tuple(text), label, teachers, "teacher:a", tuple(labels), validation_fraction=0.1, max_length=64,
        transfer=("/no/such/" + label.replace("/", "") + ".tsv",), layers=2, costs=("one", "two"),
    )  # fmt: skip
    recipe = parse_recipe(recipe_text(meant), Path("/no/such/x.toml"))
    data = recipe.data
    assert (data.text, data.label, data.labels, data.train) == (text, label, labels, FILE)
    assert (data.validation_fraction, data.max_length, data.transfer) == (0.1, 64, list(meant.transfer))
    first, second = recipe.teachers
    assert (first.name, first.model, first.learning_rate, first.head, first.licence) == (
        "a",
        "org/a",
        1e-5,
        "shared",
        label,
    )
    assert (second.head, second.learning_rate) == ("own", None)
    assert recipe.student is not None
    assert (recipe.student.init_from, recipe.student.layers) == ("teacher:a", 2)
    assert (recipe.cofinetune.epochs, recipe.distill.epochs, recipe.dump.dim) == (3, 3, 128)


def test_optional_keys() -> None:
    meant = FirstRecipe("x", FILE, ("s",), "y", (Teacher("a", "a", 1e-4),), "org/s", validation="/v.tsv", test="/t.tsv")
    recipe = parse_recipe(recipe_text(meant), Path("x.toml"))
    assert (recipe.data.validation, recipe.data.test, recipe.data.labels) == ("/v.tsv", "/t.tsv", None)
    assert recipe.student is not None
    assert recipe.student.layers is None


@settings(max_examples=20)
@given(st.text(), st.lists(st.text(), max_size=4))
def test_names_of_recipes_and_teachers_are_allowed(stem: str, models: list[str]) -> None:
    names = teacher_names([ModelFacts(model) for model in models])
    assert len({name.lower() for name in names}) == len(models)
    teachers = tuple(Teacher(name, "m") for name in names)
    meant = FirstRecipe(plain_name(stem, "task"), FILE, ("s",), "y", teachers, "s", validation_fraction=0.1)
    assert [teacher.name for teacher in parse_recipe(recipe_text(meant), Path("x.toml")).teachers] == names


@pytest.mark.parametrize(
    ("text", "mean", "length"),
    [
        ("ten words of a text that says nothing at all", 16, 24),
        ("日本語のテキスト" * 10, 55.3, 72),
        ("word " * 5000, 7002, 512),
    ],
)
def test_lengths(text: str, mean: float, length: int) -> None:
    lengths = measure([(text,)] * 3)
    assert lengths.mean == pytest.approx(mean, rel=0.02)
    assert lengths.max_length() == length
    assert lengths.max_length(78) == min(length, 72)


def test_costs_grow_with_what_costs() -> None:
    work = Work(train=10_000, texts=20_000, tokens=25, cofinetune_epochs=3, distill_epochs=3)
    costs = estimate(work, LATIN_TEACHERS, LATIN_TEACHERS, LATIN_STUDENT, 3)
    mpnet = 12 * 768 * (4 * 768 + 2 * 3072)
    rate = 40e9 * costs.cores
    alone = estimate(work, LATIN_TEACHERS[:1], LATIN_TEACHERS[:1], LATIN_STUDENT, 3)
    assert alone.cofinetune == pytest.approx(6 * mpnet * 25 * 10_000 * 3 / rate)
    assert alone.dump == pytest.approx(2 * mpnet * 25 * 20_000 / rate)
    assert estimate(work, (), LATIN_TEACHERS, LATIN_STUDENT, 3).cofinetune == 0
    doubled = estimate(replace(work, texts=40_000), LATIN_TEACHERS, LATIN_TEACHERS, LATIN_STUDENT, 3)
    assert math.isclose(doubled.cache, 2 * costs.cache, rel_tol=1e-6)
    assert doubled.teachers == costs.teachers
    assert not any(math.isnan(float(value)) for value in vars(costs).values())
