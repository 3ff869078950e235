"""A teacher with Python code of its own, from co-finetuning to a student.

The recipe of each command says whether it is run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcache.cache.manifest import read_manifest
from kdcache.cache.reader import open_cache
from kdcache.distill.stage import distill
from kdcache.dump.audit import audit
from kdcache.dump.stage import dump_teachers
from kdcache.errors import CustomCodeError
from kdcache.progress import SilentProgress
from kdcache.recipe import load_recipe
from kdcache.teachers.bundle import load_teacher
from kdcache.teachers.cofinetune import cofinetune
from kdcache.testing.custom_model import RAN, make_custom_model

ALLOWED = "teachers.custom.trust_remote_code=true"


def test_from_cofinetuning_to_a_student(
    review_recipe: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_custom_model(tmp_path / "model")
    sources = {"bert": tiny_models["bert"], "custom": model}
    tables = "".join(f'[[teachers]]\nname = "{name}"\nmodel = "{path}"\n' for name, path in sources.items())
    head, _, rest = review_recipe.read_text().partition("[[teachers]]")
    recipe = review_recipe.with_name("custom.toml")
    recipe.write_text(head + tables + "[cofinetune]" + rest.partition("[cofinetune]")[2])
    refused, allowed = load_recipe(recipe), load_recipe(recipe, [ALLOWED])
    teachers, cache, quiet = tmp_path / "teachers", tmp_path / "cache", SilentProgress()

    monkeypatch.setenv(RAN, str(tmp_path / "ran"))
    with pytest.raises(CustomCodeError, match="model"):
        cofinetune(refused, teachers, tmp_path / "work", progress=quiet)
    assert not (tmp_path / "ran").exists()
    cofinetune(allowed, teachers, tmp_path / "work", progress=quiet)
    assert (tmp_path / "ran").exists()
    records = json.loads((teachers / "teachers.json").read_text())["teachers"]
    assert records["custom"]["trust_remote_code"] is True
    assert "trust_remote_code" not in records["bert"]
    with pytest.raises(CustomCodeError):
        load_teacher(teachers, "custom")

    with pytest.raises(CustomCodeError):
        dump_teachers(refused, teachers, cache, progress=quiet)
    dump_teachers(allowed, teachers, cache, progress=quiet)
    provenance = read_manifest(cache).provenance["teachers"]
    assert provenance["custom"]["trust_remote_code"] == "true"
    assert "trust_remote_code" not in provenance["bert"]
    with pytest.raises(CustomCodeError):
        audit(open_cache(cache), teachers, rows=8, progress=quiet)
    assert not audit(open_cache(cache), teachers, rows=8, trust_remote_code=True, progress=quiet).findings

    with pytest.raises(CustomCodeError):
        distill(
            load_recipe(recipe, [ALLOWED, "student.init_from=teacher:custom"]), cache, tmp_path / "run", progress=quiet
        )
    whole = load_recipe(recipe, [ALLOWED, "student.init_from=teacher:custom", "student.trust_remote_code=true"])
    (tmp_path / "run").mkdir()
    made = distill(whole, cache, tmp_path / "run", progress=quiet)
    assert (made.student / "tiny_modeling.py").is_file()
    assert json.loads((made.student / "kdcache.json").read_text())["trust_remote_code"] is True
