"""A device with too little memory: batches run in halves, and the cache has the bytes of an undisturbed dump."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcache.cache.manifest import read_manifest
from kdcache.dump import run as dump_run
from kdcache.dump.run import open_teacher
from kdcache.dump.specs import PreparedTeacher
from kdcache.dump.stage import dump_teachers
from kdcache.errors import KdcacheError, RecipeError
from kdcache.progress import SilentProgress
from kdcache.recipe import load_recipe
from kdcache.teachers.backends import TeacherBackend, TeacherOutput
from kdcache.teachers.backends.memory import FittingBackend, tokens_that_fit
from kdcache.testing.caches import made_teacher
from tests.dump.conftest import Workbench

EXACT = ("dump.projection=none", "dump.dtype=float32", "dump.pooled=true", "dump.part_size=12", "dump.sample_texts=8")


class Small:
    """A backend on a device with room for ``tokens`` padded tokens; None: for half of the first batch."""

    def __init__(self, backend: TeacherBackend, tokens: int | None, message: str = "") -> None:
        self._backend, self._tokens, self._message = backend, tokens, message
        self.name, self.precision, self.device = backend.name, backend.precision, backend.device
        self.shapes: list[tuple[int, ...]] = []

    @property
    def record(self) -> Mapping[str, str]:
        return self._backend.record

    def run(self, inputs: dict[str, Tensor], layers: Sequence[int], pooled: bool) -> TeacherOutput:
        self.shapes.append(tuple(inputs["input_ids"].shape))
        if self._tokens is None:
            self._tokens = inputs["input_ids"].numel() // 2
        if inputs["input_ids"].numel() > self._tokens:
            raise RuntimeError(self._message) if self._message else torch.OutOfMemoryError("CUDA out of memory")
        return self._backend.run(inputs, layers, pooled)

    def close(self) -> None:
        self._backend.close()


class Noted(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def _small(tokens: int | None, made: list[Small], message: str = "") -> dump_run.OpenTeacher:
    @contextmanager
    def opened(teacher: PreparedTeacher, teachers_dir: Path) -> Iterator[TeacherBackend]:
        with open_teacher(teacher, teachers_dir) as backend:
            made.append(Small(backend, tokens, message))
            yield made[-1]

    return opened


@pytest.fixture(autouse=True)
def _not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump_run, "measured_record", lambda *_: {})


@pytest.mark.parametrize("message", ["", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_batches_run_in_halves_and_no_byte_changes(local: Workbench, tmp_path: Path, message: str) -> None:
    bench, progress, made = local.only("bert"), Noted(), list[Small]()
    whole = bench.dump(*EXACT, cache=tmp_path / "whole")
    recipe = bench.recipe(*EXACT)
    found = dump_teachers(
        recipe, bench.teachers, tmp_path / "halves", progress=progress, opener=_small(None, made, message)
    )
    assert found.identity == whole.identity
    (rows, tokens), *later = made[0].shapes
    assert rows == 8
    assert later[:2] == [(4, tokens)] * 2  # the same padding
    assert all(shape[0] * shape[1] <= 4 * tokens for shape in later)  # what was learned holds for later batches
    assert [line for line in progress.lines if "memory" in line] == [
        f"teacher 'bert': out of memory with {8 * tokens} tokens in a forward pass; from here on at most {4 * tokens}"
    ]
    (run,) = found.runs
    assert run.record["tokens_per_forward_pass"] == str(4 * tokens)


def test_one_text_that_does_not_fit_is_an_error_with_a_cure(local: Workbench, tmp_path: Path) -> None:
    bench = replace(local.only("bert"), opener=_small(2, []))
    with pytest.raises(KdcacheError, match=r"teacher 'bert': one text of \d+ tokens does not fit into the") as caught:
        bench.dump(*EXACT, cache=tmp_path / "cache")
    assert "max_length" in caught.value.hint


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    class Broken:
        name = precision = device = "cpu"

        def run(self, *_: object) -> TeacherOutput:
            raise RuntimeError("an illegal memory access was encountered")

    backend = FittingBackend(Broken(), "bert", pytest.fail)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        backend.run({"input_ids": torch.zeros(4, 4)}, (), False)


class Device:
    """A GPU on which a process takes 1 GB, and each token of its largest pass ``per_token`` bytes."""

    name, precision, device, record = "torch", "float32", "cuda", {}

    def __init__(self, memory: int, per_token: int) -> None:
        self._memory, self._per_token, self._most = memory, per_token, 0
        self.shapes: list[tuple[int, ...]] = []

    def run(self, inputs: dict[str, Tensor], layers: Sequence[int], pooled: bool) -> TeacherOutput:  # noqa: ARG002
        self.shapes.append(tuple(inputs["input_ids"].shape))
        self._most = max(self._most, inputs["input_ids"].numel())
        return TeacherOutput(torch.zeros(1), None, {})

    def free(self) -> int:
        return self._memory - 10**9 - self._most * self._per_token

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("memory", "per_token", "expected"),
    [(140 * 10**9, 300_000, 32768), (8 * 10**9, 300_000, 8192), (4 * 10**9, 100_000, 8192), (2 * 10**9, 90_000, 4096)],
)
def test_batches_are_chosen_by_the_memory_of_a_gpu(memory: int, per_token: int, expected: int) -> None:
    device, spec = Device(memory, per_token), made_teacher(max_length=128)
    tokens = tokens_that_fit(device, spec, device.free)
    assert tokens == expected
    assert device.shapes == [(16, 128), (64, 128)]
    assert tokens * per_token <= memory - 10**9


def test_the_size_that_was_chosen_is_kept_for_all_that_follows(
    local: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dump that is killed goes on with the size of its first part, whatever memory there is now; so do extensions."""
    bench, cache, auto = local.only("bert"), tmp_path / "cache", (*EXACT, "dump.tokens_per_batch=auto")
    undisturbed = bench.dump(*EXACT, "dump.tokens_per_batch=64", cache=tmp_path / "undisturbed")
    monkeypatch.setattr(dump_run, "tokens_that_fit", lambda *_: 64)

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("kdcache.dump.run.PartRun.run", dies)
        bench.dump(*auto, cache=cache)
    monkeypatch.setattr(dump_run, "tokens_that_fit", lambda *_: pytest.fail("chosen again"))
    assert bench.dump(*auto, cache=cache).identity == undisturbed.identity
    record = read_manifest(cache).provenance["teachers"]["bert"]
    assert record["tokens_per_batch"] == "64"
    bench.dump(*auto, "dump.layers=[1, 2]", cache=cache)
    assert read_manifest(cache).provenance["teachers"]["bert"]["tokens_per_batch"] == "64"


def test_without_a_gpu_auto_is_the_default(local: Workbench, tmp_path: Path) -> None:
    bench = local.only("bert")
    one = bench.dump("dump.tokens_per_batch=auto", cache=tmp_path / "auto")
    other = bench.dump(cache=tmp_path / "default")
    assert one.identity == other.identity
    assert "tokens_per_batch" not in read_manifest(tmp_path / "auto").provenance["teachers"]["bert"]


def test_anything_else_is_refused(local: Workbench) -> None:
    with pytest.raises(RecipeError, match="tokens_per_batch"):
        load_recipe(local.recipe_file, ["dump.tokens_per_batch=most"])
