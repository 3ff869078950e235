"""A recipe that trains in less than a second, as a value that tests change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdcache.recipe import Recipe
from kdcache.testing.tiny import make_model


@pytest.fixture(scope="session")
def shallow_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three encoders of one block: the second is wider, so the others get adapters. The third is kept for ``--add``."""
    directory = tmp_path_factory.mktemp("shallow")
    return {
        "bert": make_model(directory / "bert", "bert", depth=1, seed=1),
        "roberta": make_model(directory / "roberta", "roberta", width=24, depth=1, seed=2),
        "distilbert": make_model(directory / "distilbert", "distilbert", depth=1, seed=3),
    }


@pytest.fixture
def recipe(review_task: Any, shallow_models: dict[str, Path]) -> Recipe:
    """Two teachers, two epochs of 3 steps."""
    document = {
        "name": "reviews",
        "data": {
            "train": str(review_task.train),
            "validation": str(review_task.validation),
            "text": ["sentence"],
            "label": "label",
            "max_length": 32,
        },
        "teachers": [{"name": name, "model": str(shallow_models[name])} for name in ("bert", "roberta")],
        "cofinetune": {"epochs": 2, "batch_size": 32, "learning_rate": 2e-3, "accumulation": 2, "checkpoint_steps": 2},
    }
    return Recipe.model_validate(document)


def files_in(directory: Path) -> dict[str, bytes]:
    """Contents of all files below a directory, by relative path; locks and logs aside."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}
