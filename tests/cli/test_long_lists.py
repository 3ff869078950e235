"""1,500 classes: no message and no line for people repeats them all, and what differs is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdcache.cache.diff import _show
from kdcache.cache.spec import check_same_task
from kdcache.cache.stale import check_task as check_cache
from kdcache.data.task import load_task
from kdcache.dump.specs import check_task as check_teachers
from kdcache.errors import KdcacheError
from kdcache.loading.data import student_data
from kdcache.progress import listed_apart
from kdcache.recipe import DataSection
from kdcache.report.cards import model_card
from kdcache.runs import differences
from kdcache.teachers.teacher import class_order_of
from kdcache.testing.caches import SETTINGS, TASK, dump, made_plan
from tests.cli.commands import kdcache

LONGEST = 700  # characters of one line
NAMES = tuple(f"intent number {number}" for number in range(1500))
OTHERS = (*NAMES[:-1], "the odd one")


def _task(names: tuple[str, ...]) -> Any:
    return SimpleNamespace(label_names=names, text_columns=("text",), teachers={})


CHECKS: dict[str, Callable[[], object]] = {
    "dump against teachers": lambda: check_teachers(_task(OTHERS), _task(NAMES), Path("teachers")),
    "teacher to be added": lambda: check_same_task(
        _task(OTHERS), _task(NAMES), ("teacher 'bert'", "the cache"), "", same_column_names=False
    ),
    "classifier": lambda: class_order_of("bert", dict(enumerate(OTHERS)), NAMES),
    "cache": lambda: check_cache(
        Path("cache"),
        (replace(TASK, label_names=NAMES), SETTINGS, True),
        (replace(TASK, label_names=OTHERS), SETTINGS, True),
    ),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_a_mismatch_of_many_labels_is_one_short_line(check: Callable[[], object]) -> None:
    with pytest.raises(KdcacheError) as caught:
        check()
    assert len(caught.value.message) < LONGEST
    assert "1,500" in caught.value.message or "1,480 more" in caught.value.message


def test_what_differs_is_named() -> None:
    assert listed_apart(OTHERS, NAMES) == ("1,500, with the odd one", "1,500, with intent number 1499")
    swapped = (*NAMES[:7], NAMES[8], NAMES[7], *NAMES[9:])
    assert listed_apart(swapped, NAMES) == (
        "1,500 in another order (number 7 is 'intent number 8')", "1,500 (number 7 is 'intent number 7')",
    )  # fmt: skip
    assert listed_apart(("a", "b"), ("b", "a")) == ("a, b", "b, a")


def _data(tmp_path: Path, names: tuple[str, ...], rows: int = 1500) -> str:
    path = tmp_path / "data.tsv"
    path.write_text("text\tlabel\n" + "".join(f"text {row}\t{names[row % len(names)]}\n" for row in range(rows)))
    return str(path)


def test_data_of_many_classes(tmp_path: Path) -> None:
    section = DataSection(train=_data(tmp_path, NAMES), text=["text"], label="label")
    counts = load_task(section).counts
    assert all(len(line) < LONGEST for line in counts.lines())
    cache = SimpleNamespace(task=SimpleNamespace(label_names=OTHERS, text_columns=("text",)), path=Path("cache"))
    with pytest.raises(KdcacheError) as caught:
        student_data(section, cache)  # type: ignore[arg-type]
    assert len(caught.value.message) < LONGEST and "the odd one" in caught.value.message
    with pytest.raises(KdcacheError) as caught:
        load_task(section.model_copy(update={"labels": list(OTHERS)}))
    assert len(caught.value.message) < LONGEST
    wide = tmp_path / "wide.csv"
    wide.write_text(",".join(f"column {number}" for number in range(3000)) + "\n1\n")
    with pytest.raises(KdcacheError) as caught:
        load_task(section.model_copy(update={"train": str(wide)}))
    assert len(caught.value.message) < LONGEST


def test_a_recipe_of_many_labels(tmp_path: Path) -> None:
    labels = ", ".join(f'"{name}"' for name in (*NAMES, *NAMES))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'name = "x"\n[data]\ntrain = "t.tsv"\ntext = ["s"]\nlabel = "l"\nlabels = [{labels}]\n')
    said = kdcache("pipelines", "validate", recipe)
    assert said.code == 2
    assert max(map(len, said.err.splitlines())) < LONGEST
    old, new = ({"data.labels": repr(list(names))} for names in (NAMES, OTHERS))
    assert all(len(line) < LONGEST for line in differences(old, new))


def test_a_cache_of_many_labels_for_people(tmp_path: Path) -> None:
    dump(tmp_path / "cache", replace(made_plan(4, 2, ()), task=replace(TASK, label_names=NAMES)))
    said = kdcache("cache", "info", tmp_path / "cache")
    assert said.code == 0 and max(map(len, said.out.splitlines())) < LONGEST
    assert kdcache("cache", "info", tmp_path / "cache", "--json").document["label_names"] == list(NAMES)
    assert len(_show(list(NAMES))) < LONGEST
    card = model_card({"label_names": list(NAMES), "student": {}, "scores": {}})
    assert max(map(len, card.splitlines())) < 2 * LONGEST
