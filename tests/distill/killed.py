"""Runs a training again and again in children that are killed (``kdcache.testing.killing``), and prints what became of
it.

    python tests/distill/killed.py RECIPE CACHE OVERRIDES ATTEMPTS

ATTEMPTS is JSON: run directory -> list of points. Prints JSON: run directory -> exit statuses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kdcache.distill.stage import DistillTask, distill
from kdcache.progress import SilentProgress
from kdcache.recipe import load_recipe
from kdcache.students import speed
from kdcache.testing.killing import run_child


def import_all() -> None:
    """What children would each import for themselves."""
    import accelerate
    import zarr
    from transformers import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        MODEL_MAPPING,
        BertConfig,
        RobertaConfig,
        XLMRobertaConfig,
    )

    assert accelerate
    assert zarr
    assert MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[BertConfig]
    assert [MODEL_MAPPING[kind] for kind in (BertConfig, RobertaConfig, XLMRobertaConfig)]


def main(recipe_file: str, cache: str, overrides: str, attempts: str) -> None:
    import_all()
    speed._LATENCY_TEXTS, speed._THROUGHPUT_TEXTS = 2, 4  # each child times the teachers
    recipe = load_recipe(recipe_file, json.loads(overrides))

    def status(root: Path, point: str) -> int:
        return run_child(lambda: distill(recipe, Path(cache), root, progress=SilentProgress()), DistillTask, point)

    print(
        json.dumps(
            {root: [status(Path(root), point) for point in points] for root, points in json.loads(attempts).items()}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
