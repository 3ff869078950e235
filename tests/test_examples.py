"""The examples of the documentation run as they stand, on a tiny cache."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kdcache
from kdcache.dump.stage import dump_teachers
from kdcache.progress import SilentProgress
from kdcache.recipe import load_recipe
from kdcache.testing.teachers import make_teachers
from kdcache.testing.tiny import make_model

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture(scope="module")
def cache(review_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("examples")
    teachers = make_teachers(root / "teachers", {"bert": "bert", "roberta": "roberta", "xlm": "xlm-roberta"})
    dump_teachers(load_recipe(review_recipe), teachers, root / "cache", progress=SilentProgress())
    return root / "cache"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["plain_loop", "trainer"])
def test_example_trains_and_saves(cache: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForSequenceClassification

    model = make_model(tmp_path / "model", "bert", depth=2)
    loss = example(name).main(str(cache), str(model), str(tmp_path / "student"), epochs=2)
    assert math.isfinite(loss)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").config.num_labels == 2


def test_the_plain_loop_is_short() -> None:
    source = (EXAMPLES / "plain_loop.py").read_text().split("def main", 1)[1].splitlines()
    assert len(source) <= 45


def test_importing_kdcache_imports_no_torch() -> None:
    code = (
        "import sys, kdcache; kdcache.open_cache, kdcache.__version__; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="it has: Run, __version__, cofinetune, distill, dump_teachers"):
        _ = kdcache.opencache
    assert set(dir(kdcache)) == set(kdcache.__all__)
