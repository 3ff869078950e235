"""A recipe reduced to its first training rows, for measurements that need a little real text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.data.task import load_task

if TYPE_CHECKING:
    from kdcache.recipe import Recipe


def first_rows(recipe: Recipe, rows: int, file: Path) -> Recipe:
    """Write the recipe with its first training rows, and without other splits, to ``file``."""
    task = load_task(recipe.data)
    train = task.splits["train"]
    with file.open("w", encoding="utf-8") as out:
        print("\t".join([*recipe.data.text, recipe.data.label]), file=out)
        for text_id, label in zip(train.text_ids[:rows], train.labels[:rows], strict=True):
            print("\t".join([*task.texts[text_id.tobytes()], task.label_names[label]]), file=out)
    changes: dict[str, object] = {
        "train": str(file),
        "validation": None,
        "validation_fraction": 0.0,
        "test": None,
        "transfer": [],
    }
    data = recipe.data.model_copy(update={**changes, "transfer_rows": None, "labels": list(task.label_names)})
    return recipe.model_copy(update={"data": data})
