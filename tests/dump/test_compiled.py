"""Teachers as graphs of torch.compile: the same outputs, few graphs, and part of the specification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache import files
from kdcache.cache.manifest import read_manifest
from kdcache.cache.reader import open_cache
from kdcache.dump import run as dump_run
from kdcache.dump.audit import audit
from kdcache.dump.extend import _settings_of
from kdcache.dump.tolerance import max_noise
from kdcache.errors import MismatchError, ModelError, RecipeError
from kdcache.progress import SilentProgress
from kdcache.recipe import DumpSection
from kdcache.runs import stage_inputs
from kdcache.teachers.backends import open_backend, torch_backend
from kdcache.teachers.backends.memory import FittingBackend
from kdcache.teachers.bundle import load_teacher
from kdcache.testing.faults import UnsyncedDisk
from kdcache.training import compiled as module
from tests.dump.conftest import Workbench
from tests.dump.test_memory import Small
from tests.dump.test_stage import digests

COMPILED = "dump.compile=true"
WHOLE = ("dump.projection=none", "dump.dtype=float32")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(dump_run, "measured_record", lambda *_: {})
    torch._dynamo.reset()
    with files.use_disk(UnsyncedDisk()):
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the ids of every graph that is made; graphs run as they are."""
    made: list[tuple[int, ...]] = []

    def counted(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        tables = [each.shape for each in inputs if isinstance(each, Tensor) and each.dtype == torch.int64]
        made.append(max((tuple(map(int, shape)) for shape in tables if len(shape) == 2), default=()))
        return graph.forward

    monkeypatch.setattr(module, "_BACKEND", counted)
    return made


def _inputs(rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * rows + length)
    mask = (torch.arange(length) < torch.arange(length, length - rows, -1).clamp(min=2)[:, None]).long()
    ids = torch.randint(5, 50, (rows, length), generator=generator)
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


# shared head, shared head behind an adapter, own head
@pytest.mark.parametrize(
    ("name", "precision"), [("bert", "float32"), ("roberta", "bf16+float32-head"), ("xlm", "bf16+float32-head")]
)
def test_a_few_graphs_give_what_the_teacher_gives(
    local: Workbench, graphs: list[tuple[int, ...]], name: str, precision: str
) -> None:
    teacher = load_teacher(local.teachers, name)
    shapes = [(4, 9), (2, 10), (3, 12), (7, 11), (1, 9)]
    shapes += [(5, 21), (6, 24), (2, 32)] if name == "bert" else []
    layers = [1, teacher.depth]
    plain = open_backend("torch", teacher, layers, precision=precision, work_dir=local.cache)
    expected = [plain.run(_inputs(*shape), layers, True) for shape in shapes]
    backend = open_backend(
        "torch", teacher, layers, precision=f"{precision}+compiled", max_length=32, work_dir=local.cache
    )
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == "float32" else {"rtol": 0.05, "atol": 0.05}
    for shape, wanted in zip(shapes, expected, strict=True):
        found = backend.run(_inputs(*shape), layers, True)
        torch.testing.assert_close(found.logits, wanted.logits, **close)
        torch.testing.assert_close(found.pooled, wanted.pooled, **close)
        for layer in layers:
            torch.testing.assert_close(found.hidden[layer], wanted.hidden[layer], **close)
    assert sorted(length for _, length in graphs) == sorted({-(-length // 4) * 4 for _, length in shapes}), (
        "one for each length, whatever the rows; the single text ran as it is"
    )
    backend.close()
    assert "forward" not in vars(teacher.model.encoder.base_model)


def test_the_head_of_a_compiled_teacher_runs_in_float32(local: Workbench, graphs: list[tuple[int, ...]]) -> None:
    teacher = load_teacher(local.teachers, "xlm")
    inputs, last = _inputs(4, 24), teacher.depth
    backend = open_backend("torch", teacher, [last], precision="bf16+float32-head+compiled", work_dir=local.cache)
    found, mask = backend.run(inputs, [last], False), inputs["attention_mask"].bool()
    states = torch.zeros(*mask.shape, teacher.width)
    states[mask] = found.hidden[last]
    with torch.no_grad():
        torch.testing.assert_close(found.logits, teacher.model.encoder.classifier(states))
    assert graphs


def test_a_compiled_dump_is_a_specification_of_its_own(
    local: Workbench, graphs: list[tuple[int, ...]], tmp_path: Path
) -> None:
    bench = local.only("bert")
    plain = bench.dump(*WHOLE, cache=tmp_path / "plain")
    assert not graphs
    compiled = bench.dump(*WHOLE, COMPILED, cache=tmp_path / "compiled")
    assert graphs and compiled.identity != plain.identity
    one, other = open_cache(tmp_path / "plain"), open_cache(tmp_path / "compiled")
    assert [cache.teachers["bert"].precision for cache in (one, other)] == ["float32", "float32+compiled"]
    for part in one.parts:
        np.testing.assert_allclose(
            other.outputs("bert", part.name).logits, one.outputs("bert", part.name).logits, rtol=1e-4, atol=1e-5
        )
    for cache, overrides in (("plain", (COMPILED,)), ("compiled", ())):
        with pytest.raises(MismatchError, match=r"precision 'float32(\+compiled)?'; now it is 'float32(\+compiled)?'"):
            bench.dump(*WHOLE, *overrides, cache=tmp_path / cache)
    assert bench.dump(*WHOLE, COMPILED, cache=tmp_path / "compiled").identity == compiled.identity
    before = len(graphs)
    assert audit(other, bench.teachers, rows=12, progress=SilentProgress()).findings == []
    assert len(graphs) == before, "an audit compares within a tolerance and compiles nothing"
    assert _settings_of(other.teachers["bert"], other.manifest.contents).compile
    assert _settings_of(one.teachers["bert"], one.manifest.contents).compile is None


def test_every_way_to_dump_compiles(local: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def spied(network: torch.nn.Module) -> AbstractContextManager[None]:
        asked.append(type(network).__name__)
        return nullcontext()

    monkeypatch.setattr(torch_backend, "compiled_forward", spied)
    bench, whole = local.only("bert"), tmp_path / "whole"
    bench.dump(COMPILED, cache=whole)
    for index in (1, 0):
        bench.shard(index, 2, COMPILED, cache=tmp_path / "shards")
    assert asked == ["BertModel"] * 3
    assert digests(tmp_path / "shards").keys() == digests(whole).keys()
    assert read_manifest(tmp_path / "shards").identity == read_manifest(whole).identity


def test_a_compiled_teacher_runs_in_halves_without_memory(local: Workbench, graphs: list[tuple[int, ...]]) -> None:
    teacher, inputs = load_teacher(local.teachers, "bert"), _inputs(8, 10)
    whole = open_backend("torch", teacher, [1], precision="float32", work_dir=local.cache).run(inputs, [1], False)
    backend = open_backend("torch", teacher, [1], precision="float32+compiled", max_length=32, work_dir=local.cache)
    fitting = FittingBackend(Small(backend, 40), "bert", lambda _: None)
    found = fitting.run(inputs, [1], False)
    assert fitting.record["tokens_per_forward_pass"] == "40" and len(graphs) == 1
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.hidden[1], whole.hidden[1], rtol=1e-4, atol=1e-5)
    backend.close()


def test_where_the_key_is_not_given_nothing_changes(local: Workbench) -> None:
    without, false = local.recipe(), local.recipe("dump.compile=false")
    assert without == false and without.dump.compile is None
    assert stage_inputs(without, "cache") == stage_inputs(false, "cache")
    assert stage_inputs(without, "cache").items() ^ stage_inputs(local.recipe(COMPILED), "cache").items() == {
        ("dump.compile", "true")
    }


def test_onnxruntime_does_not_compile(local: Workbench) -> None:
    with pytest.raises(RecipeError, match=r'compile = true is for backend = "torch"; .* "onnxruntime"'):
        local.recipe(COMPILED, "dump.backend=onnxruntime")
    assert DumpSection(backend="onnxruntime", compile=False).compile is None
    pytest.importorskip("onnxruntime")
    with pytest.raises(ModelError, match=r"cannot run in float32\+compiled"):
        open_backend(
            "onnxruntime", load_teacher(local.teachers, "bert"), [1], precision="float32+compiled", work_dir=local.cache
        )


def test_noise_is_that_of_the_number_format() -> None:
    assert max_noise("bf16+float32-head+compiled") == max_noise("bf16+compiled") == max_noise("bf16")
