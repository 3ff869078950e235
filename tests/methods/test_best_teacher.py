"""The best teacher alone against its formula in a loop; which one it is, and when it is not known."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.distill.setup import prepare
from kdcache.errors import RecipeError
from kdcache.methods.base import Moment
from kdcache.progress import SilentProgress
from kdcache.report.metrics import scores
from kdcache.testing.method_contract import GoldenMethod, PlainStep
from tests.conftest import TinyRun


class TestBestTeacher(GoldenMethod):
    method = "best-teacher"

    def expected(self, step: PlainStep) -> dict[str, float]:
        return {"task": step.task, "soft": step.soft_of(step.teachers[1])}  # b has the better score


@pytest.mark.parametrize("select_by", ["accuracy", "loss"])
def test_it_is_the_best_by_the_logits_of_the_cache(tiny_run: TinyRun, tmp_path: Path, select_by: str) -> None:
    recipe = tiny_run.recipe("distill.method=best-teacher", f"distill.select_by={select_by}")
    training = prepare(recipe, tiny_run.cache, tmp_path, None, progress=SilentProgress())
    model = training.model()
    labels = training.data.splits["validation"].labels
    each = [scores(labels, logits.numpy())[select_by] for logits in training.source.logits_for("validation")]
    best = each.index(min(each) if select_by == "loss" else max(each))
    batch = next(iter(training.source.batches(0)))
    _, terms = model(batch, model.counts([batch]), Moment(0, 8))
    weights = [terms[f"weight/{name}"].item() for name in training.source.teachers]
    assert weights == [float(index == best) for index in range(len(each))]


def test_without_validation_texts_it_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe("distill.method=best-teacher")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"validation": None})})
    training = prepare(recipe, tiny_run.cache, tmp_path, None, progress=SilentProgress())
    assert "validation" not in training.data.splits
    with pytest.raises(RecipeError, match="method 'best-teacher' needs the teachers' validation scores") as caught:
        training.model()
    assert "data.validation" in caught.value.hint
    assert caught.value.exit_code == 2
