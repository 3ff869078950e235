from pathlib import Path

import pytest

from kdcache.testing.teachers import make_teachers


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    families = {"bert": "bert", "roberta": "roberta", "distil": "distilbert", "own": "xlm-roberta"}
    return make_teachers(
        tmp_path_factory.mktemp("teachers"), families, widths={"roberta": 12}, own_heads=["own"], depth=2
    )  # type: ignore[arg-type]
