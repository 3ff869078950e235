"""On a GPU: a training step waits for the device only where losses are read, and batches arrive as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdcache.data.encoding import load_tokenizer
from kdcache.distill.stage import distill
from kdcache.loading.cached import loader
from kdcache.loading.targets import Batch
from kdcache.loading.transfer import on_device
from kdcache.progress import SilentProgress
from kdcache.training import loop
from tests.conftest import TinyRun

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Synchronization debug mode")]

_READ, _WARM = 4, 2  # losses are read after every fourth step; the first two steps fill caches


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["distill.accumulation=2"],
        ["distill.method=kd"],
        ["distill.method=best-teacher"],
        ["distill.precision=bf16"],
    ],
    ids=" ".join,
)
def test_a_step_does_not_wait_for_the_device_where_nothing_is_read(
    tiny_run: TinyRun, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[bool] = []
    step = loop._Run.step

    def strict(run: loop._Run, batch: object) -> None:
        reads = len(done) % _READ == _READ - 1
        checked = len(done) >= _WARM and not reads
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            step(run, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        done.append(checked)

    monkeypatch.setattr(loop, "_READ_STEPS", _READ)
    monkeypatch.setattr(loop._Run, "step", strict)
    distill(tiny_run.recipe(*overrides), tiny_run.cache, tmp_path, progress=SilentProgress())
    assert any(done)


def test_batches_arrive_as_they_were(tiny_run: TinyRun) -> None:
    source = loader(tiny_run.cache, load_tokenizer(str(tiny_run.teachers / "bert")), batch_size=12, student_layers=2)
    expected = list(source.batches(0))

    def steps() -> Iterator[tuple[int, list[Batch]]]:
        yield from ((number, [batch]) for number, batch in enumerate(source.batches(0)))

    moved = list(on_device(steps, torch.device("cuda")))
    assert len(moved) == len(expected)
    for (_, (there,)), here in zip(moved, expected, strict=True):
        found, wanted = list[torch.Tensor](), list[torch.Tensor]()
        there.mapped(lambda tensor, found=found: (found.append(tensor), tensor)[1])  # type: ignore[misc]
        here.mapped(lambda tensor, wanted=wanted: (wanted.append(tensor), tensor)[1])  # type: ignore[misc]
        assert {tensor.device.type for tensor in found} == {"cuda"}
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, wanted, strict=True))
