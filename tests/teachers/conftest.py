"""A recipe that trains in a second, as a value that tests change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdcache.recipe import Recipe


@pytest.fixture
def recipe(review_task: Any, tiny_models: dict[str, Path]) -> Recipe:
    """Three teachers, two epochs of 6 steps; the second teacher is wider, so the others get adapters."""
    document = {
        "name": "reviews",
        "data": {
            "train": str(review_task.train),
            "validation": str(review_task.validation),
            "text": ["sentence"],
            "label": "label",
            "max_length": 32,
        },
        "teachers": [{"name": name, "model": str(path)} for name, path in tiny_models.items()],
        "cofinetune": {"epochs": 2, "batch_size": 16, "learning_rate": 2e-3, "accumulation": 2, "checkpoint_steps": 2},
    }
    return Recipe.model_validate(document)
