"""In half precision the head runs in float32; caches that have it otherwise stay as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.cache.manifest import read_manifest
from kdcache.cache.reader import open_cache
from kdcache.data.encoding import encode, pad, padding_id
from kdcache.dump import run as dump_run
from kdcache.dump import specs
from kdcache.dump.audit import audit
from kdcache.dump.tolerance import max_noise
from kdcache.progress import SilentProgress
from kdcache.teachers.backends import open_backend
from kdcache.teachers.bundle import load_teacher
from kdcache.teachers.head import head_modules
from kdcache.testing.backends import TEXTS
from tests.dump.conftest import Workbench

BF16 = ("dump.precision=bf16", "dump.layers=[4]", "dump.projection=none", "dump.dtype=float32")


@pytest.fixture(autouse=True)
def _not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump_run, "measured_record", lambda *_: {})


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm"])  # shared head, shared head behind an adapter, own head
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_logits_are_what_float32_says_of_the_states(local: Workbench, name: str, precision: str) -> None:
    teacher = load_teacher(local.teachers, name)
    encoded = encode(teacher.tokenizer, TEXTS, teacher.max_length)
    inputs = pad(encoded, range(len(TEXTS)), padding_id(teacher.tokenizer))
    mask = inputs["attention_mask"].bool()
    rough, exact = (
        open_backend("torch", teacher, [teacher.depth], precision=one, work_dir=local.cache).run(
            inputs, [teacher.depth], True
        )
        for one in (precision, f"{precision}+float32-head")
    )
    assert torch.equal(rough.hidden[teacher.depth], exact.hidden[teacher.depth])  # the encoder is as it was
    states = torch.zeros(*mask.shape, teacher.width)
    states[mask] = exact.hidden[teacher.depth]
    with torch.no_grad():
        if teacher.model.head is not None:
            last = states if teacher.model.adapter is None else teacher.model.adapter(states)
            logits, pooled = teacher.model.head(last, inputs["attention_mask"])
            torch.testing.assert_close(exact.pooled, pooled)
        else:
            logits = teacher.model.encoder.classifier(states)
    torch.testing.assert_close(exact.logits, logits)
    assert not torch.allclose(rough.logits, logits, rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(head_modules(teacher.model)[0])  # the model is as it was


def test_a_new_dump_in_bf16_says_so_and_passes_its_audit(local: Workbench, tmp_path: Path) -> None:
    bench, cache = local.only("bert"), tmp_path / "cache"
    bench.dump(*BF16, cache=cache)
    assert open_cache(cache).teachers["bert"].precision == "bf16+float32-head"
    assert audit(open_cache(cache), bench.teachers, rows=12, progress=SilentProgress()).findings == []
    assert max_noise("bf16+float32-head") == max_noise("bf16")
    before = read_manifest(cache).identity
    assert bench.dump(*BF16, cache=cache).identity == before


def test_what_float32_stores_is_named_as_before(local: Workbench) -> None:
    assert open_cache(local.cache).teachers["bert"].precision == "float32"


def test_a_cache_of_0_1_0_in_bf16_goes_on_as_it_was(
    local: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun, interrupted, extended: always with the head in bf16, so no cache has logits of two kinds."""
    bench = local.only("bert")
    with monkeypatch.context() as patch:
        patch.setattr(specs, "head_modules", lambda _: ())  # as 0.1.0
        whole = bench.dump(*BF16, "dump.pooled=true", cache=tmp_path / "whole")
        old = open_cache(tmp_path / "whole")
        assert old.teachers["bert"].precision == "bf16"
        write, writes = dump_run.PartRun.run, list[int]()

        def dies(self: dump_run.PartRun, *arguments: object) -> None:
            writes.append(1)
            if len(writes) == 4:
                raise KeyboardInterrupt
            write(self, *arguments)  # type: ignore[arg-type]

        patch.setattr(dump_run.PartRun, "run", dies)
        with pytest.raises(KeyboardInterrupt):
            bench.dump(*BF16, "dump.pooled=true", cache=tmp_path / "cache")
    assert bench.dump(*BF16, "dump.pooled=true", cache=tmp_path / "cache").identity == whole.identity
    more = replace(bench, cache=tmp_path / "cache")
    more.dump(*BF16[:1], "dump.layers=[2, 4]", *BF16[2:], "dump.pooled=true")
    extended = open_cache(more.cache)
    assert extended.teachers["bert"].precision == "bf16"
    part = extended.parts[0].name
    np.testing.assert_array_equal(extended.outputs("bert", part).logits, old.outputs("bert", part).logits)
