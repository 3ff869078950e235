"""What out-of-fold teachers cost: K - 1 times the steps of co-finetuning. The dump itself takes no longer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kdcache.progress import format_seconds

if TYPE_CHECKING:
    from kdcache.data.task import TaskData
    from kdcache.recipe import Recipe
    from kdcache.teachers.bundle import Bundle

_TRAINING = 3.0  # times a forward pass: with the backward pass


@dataclass(frozen=True)
class FoldsPlan:
    """``seconds``: of what is still to be trained, estimated; 0 if the teachers have their folds."""

    count: int
    rows: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}

    def lines(self) -> list[str]:
        """Text for the terminal."""
        if not self.seconds:
            return [f"the logits of train texts come from {self.count} folds; the dump takes no longer with them"]
        return [
            f"{self.count} folds are still to be trained: {self.count - 1} times the steps of co-finetuning on "
            f"{self.rows:,} labelled rows, about {format_seconds(self.seconds)}; the dump takes no longer with them"
        ]


def without_folds(recipe: Recipe) -> Recipe:
    """The recipe with the logits of the teachers themselves: what a plan measures does not depend on folds."""
    return recipe.model_copy(update={"dump": recipe.dump.model_copy(update={"out_of_fold": False})})


def folds_plan(
    recipe: Recipe, task: TaskData, bundle: Bundle, seconds_per_text: Mapping[str, float]
) -> FoldsPlan | None:
    """The folds of the recipe, or of the teachers; None without any.

    ``seconds_per_text``: of a forward pass, by teacher. Each of K bundles is trained on all rows but a K-th, and the
    train texts are read once by the bundles and once by the teachers.
    """
    if recipe.dump.out_of_fold is False:
        return None
    record = bundle.training.get("folds")
    trained = [name for name in seconds_per_text if bundle.teachers[name].head == "shared"]
    count = recipe.cofinetune.folds or (record["count"] if record else None)
    if count is None or not trained:
        return None
    rows = int((task.splits["train"].labels >= 0).sum())
    missing = [name for name in trained if record is None or name not in record["teachers"]]
    passes = _TRAINING * (count - 1) * recipe.cofinetune.epochs + 2
    return FoldsPlan(count, rows, rows * passes * sum(seconds_per_text[name] for name in missing))
