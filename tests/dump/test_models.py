"""Teachers other than BERT's kin, from co-finetuning to the cache.

What is stored is what transformers says of each text alone.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cache.reader import open_cache
from kdcache.dump.audit import audit
from kdcache.dump.stage import dump_teachers
from kdcache.dump.tolerance import max_noise, tolerance
from kdcache.errors import ModelError
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe, load_recipe
from kdcache.teachers.backends.torch_backend import TorchBackend
from kdcache.teachers.cofinetune import cofinetune
from kdcache.testing.architectures import ARCHITECTURES
from kdcache.testing.teacher_check import reference_logits
from tests.dump.conftest import Workbench


def _recipe(review_recipe: Path, place: Path, teachers: dict[str, Any], *overrides: str) -> Recipe:
    """The shared recipe with these teachers: name to (architecture, head)."""
    head, *tables = re.split(r"^(?=\[)", review_recipe.read_text(), flags=re.MULTILINE)
    kept = [table for table in tables if not table.startswith(("[[teachers]]", "[student]", "[distill]"))]
    for name, (architecture, kind) in teachers.items():
        model = ARCHITECTURES[architecture].save(place / name, "classifier" if kind == "own" else "base", seed=3)
        kept.append(f'[[teachers]]\nname = "{name}"\nmodel = "{model}"\nhead = "{kind}"\n')
    path = place / "recipe.toml"
    path.write_text(re.sub(r'"(\w+\.tsv)"', rf'"{review_recipe.parent}/\1"', "".join([head, *kept])))
    return load_recipe(path, ["dump.layers=[3]", *overrides])


def _stored_logits(cache: Path, name: str) -> tuple[list[tuple[str, ...]], np.ndarray]:
    opened = open_cache(cache)
    texts = [text for part in opened.parts for text in opened.texts(part.name)]
    return texts, np.concatenate([opened.outputs(name, part.name).logits for part in opened.parts])


@pytest.mark.parametrize("architecture", ["XLNet", "Llama", "GPT-2", "Qwen3"])
def test_an_own_head_is_stored_as_transformers_reads_it(architecture: str, review_recipe: Path, tmp_path: Path) -> None:
    recipe = _recipe(review_recipe, tmp_path, {"it": (architecture, "own")})
    cofinetune(recipe, tmp_path / "teachers", tmp_path / "work", progress=SilentProgress())
    dump_teachers(recipe, tmp_path / "teachers", tmp_path / "cache", progress=SilentProgress())
    texts, logits = _stored_logits(tmp_path / "cache", "it")
    np.testing.assert_allclose(logits[:40], reference_logits(tmp_path / "it", texts[:40]), atol=1e-4)
    report = audit(open_cache(tmp_path / "cache"), tmp_path / "teachers", rows=40, progress=SilentProgress())
    assert report.findings == []


def test_decoders_learn_under_the_shared_head_with_the_last_token(review_recipe: Path, tmp_path: Path) -> None:
    settings = ("cofinetune.pooling=last", "cofinetune.epochs=12", "cofinetune.learning_rate=2e-3")
    recipe = _recipe(review_recipe, tmp_path, {"qwen": ("Qwen2", "shared"), "llama": ("Llama", "shared")}, *settings)
    result = cofinetune(recipe, tmp_path / "teachers", tmp_path / "work", progress=SilentProgress())
    assert min(scores["accuracy"] for scores in result.scores.values()) >= 0.8, result.scores
    dump_teachers(recipe, tmp_path / "teachers", tmp_path / "cache", progress=SilentProgress())
    assert (
        audit(open_cache(tmp_path / "cache"), tmp_path / "teachers", rows=40, progress=SilentProgress()).findings == []
    )
    for setting in ("dump.tokens=first", "dump.per_layer.last={tokens='first'}"):
        asked = load_recipe(tmp_path / "recipe.toml", ["dump.layers=[3]", setting, *settings])
        with pytest.raises(ModelError, match="causal decoder: the first token, for which layer 3") as caught:
            dump_teachers(asked, tmp_path / "teachers", tmp_path / "other", progress=SilentProgress())
        assert "pooled" in caught.value.hint


def test_the_audit_finds_a_teacher_whose_outputs_depend_on_padding(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = TorchBackend.run

    def reads_padding(self: TorchBackend, inputs: dict[str, Any], layers: Any, pooled: bool) -> Any:
        output = ran(self, inputs, layers, pooled)
        longer = 1 + 0.1 * inputs["input_ids"].shape[1]
        return replace(
            output, logits=output.logits * longer, hidden={layer: h * longer for layer, h in output.hidden.items()}
        )

    monkeypatch.setattr(TorchBackend, "run", reads_padding)
    bench.only("bert").dump("dump.layers=[2]")
    report = audit(open_cache(bench.cache), bench.teachers, rows=60, progress=SilentProgress())
    found = {finding.component: finding.message for finding in report.findings}
    assert re.fullmatch(
        r"padding a text changes its hidden states by [\d.]+% and its logits by [\d.]+%; "
        r"in float32 at most 1% is rounding",
        found["padding"],
    )
    (teacher,) = report.teachers
    assert teacher.tolerance is not None and teacher.tolerance.hidden <= 0.05  # not widened by what it found


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_noise_widens_the_tolerance_only_up_to_its_bound(precision: str) -> None:
    most = max_noise(precision)
    assert tolerance(precision, 0.0, 0.0).hidden < tolerance(precision, most / 2, most / 2).hidden
    assert tolerance(precision, 1e3, 1e3) == tolerance(precision, most, most)
