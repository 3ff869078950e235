"""Whether the student without teachers may be compared with the student of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdcache.recipe import dump_toml, load_recipe
from kdcache.report.same_student import not_compared, other_settings
from kdcache.runs import RunDirectory, mark_finished, stage_inputs
from tests.report.test_table import results


def made(root: Path, recipe: Path, *changes: str) -> RunDirectory:
    """A run whose baseline was made with the recipe, and whose student was then made with ``changes``."""
    run, of_student = RunDirectory(root), load_recipe(recipe, [*changes])
    run.create()
    mark_finished(run, "baseline", stage_inputs(load_recipe(recipe, ["baseline.epochs=9"]), "baseline"), 1.0)
    mark_finished(run, "student", stage_inputs(of_student, "student", upstream="cache"), 1.0)
    run.recipe_file.write_text(dump_toml(of_student))
    return run


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        (["student.layers=1"], ["student.layers"]),
        (["student.init_from=hub/other"], ["student.init_from"]),
        (["distill.learning_rate=0.5", "distill.seed=3"], ["distill.learning_rate", "distill.seed"]),
        (["data.test=dev.tsv"], ["data.test"]),
        (["baseline.epochs=8"], ["distill.epochs"]),
        (["distill.epochs=5", "distill.method=kd", "distill.temperature=2.0", "distill.weights.task=0.5"], []),
        (["distill.weights.task=0"], []),
        (["data.transfer=[]", "distill.teachers=['bert']", "distill.projection_learning_rate=0.1"], []),
    ],
)
def test_what_both_students_share_must_be_the_same(
    review_recipe: Path, tmp_path: Path, changes: list[str], differing: list[str]
) -> None:
    run = made(tmp_path / "run", review_recipe, "baseline.epochs=9", *changes)
    assert other_settings(run, results(0.9), results(0.8, "fine-tune")) == differing


def test_what_is_not_recorded_counts_as_equal(review_recipe: Path, tmp_path: Path) -> None:
    """The data files were moved away when the student was made; then another command wrote its recipe."""
    run = made(tmp_path / "run", review_recipe, "baseline.epochs=9", f"data.test={tmp_path / 'moved.tsv'}")
    assert other_settings(run, results(0.9), results(0.8)) == []
    run = made(tmp_path / "other", review_recipe, "baseline.epochs=9")
    run.recipe_file.write_text(dump_toml(load_recipe(review_recipe, ["distill.epochs=50"])))
    assert other_settings(run, results(0.9), results(0.8)) == []
    run.recipe_file.unlink()
    assert other_settings(run, results(0.9), results(0.8)) == []


def test_without_records_the_results_are_compared(tmp_path: Path) -> None:
    run, ours, alone = RunDirectory(tmp_path), results(0.9), results(0.8, "fine-tune")
    assert other_settings(run, ours, alone) == []

    def student(**values: Any) -> dict[str, Any]:
        return {"seed": 0, "student": {"head": "standard", "init_from": "/moved/bert", **values}}

    first, second = {"teachers/bert": "sha256:1"}, {"teachers/bert": "sha256:2"}
    assert other_settings(run, ours | student(taken_over=first), alone) == []  # that one is of an earlier version
    found = other_settings(
        run,
        ours | student(layers=2, taken_over=first),
        alone | student(layers=3, taken_over=second) | {"rows": {"test": 7}},
    )
    assert found == ["student.layers", "teachers/bert", "rows of test"]
    assert "(student.layers, teachers/bert, rows of test)" in not_compared(found)
    assert "(1, 2, 3, 4 and 2 more)" in not_compared("123456")
