"""The teacher waits for nothing: not for tokenisation, not for writing, and for a device once per batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.cache.reader import open_cache
from kdcache.cache.writer import CacheWriter
from kdcache.codecs.base import HiddenBlock, TokenSelection
from kdcache.codecs.registry import format_of
from kdcache.dump import run as dump_run
from kdcache.dump.behind import BackgroundWriter, fetch
from kdcache.dump.engine import TextBatches, fit_bases, run_part
from kdcache.teachers.backends import TeacherOutput
from kdcache.teachers.backends.torch_backend import TorchBackend
from kdcache.testing.accelerator import DEVICE, fake_accelerator, recorded_reads
from tests.codecs.test_of_0_1_0 import FORMS, Numbers, basis, exact_teacher, exact_texts
from tests.dump.conftest import Workbench

SECONDS = 60.0  # of patience; a machine may be busy


def _becomes(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + SECONDS
    while not true() and time.monotonic() < end:
        time.sleep(0.002)
    return true()


def test_parts_are_tokenised_ahead_and_written_behind_the_teacher(
    local: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass ends only when the part after it is tokenised, a write only when the part after it runs."""
    encode, run, write = dump_run.encode, TorchBackend.run, CacheWriter.write_part
    parts = len(open_cache(local.cache).parts)
    encoded, ran, wrote, late = list[int](), list[str](), list[str](), list[str]()

    def encoding(*arguments: Any) -> Any:
        encoded.append(threading.get_ident())
        return encode(*arguments)

    def running(self: TorchBackend, inputs: dict[str, torch.Tensor], layers: Sequence[int], pooled: bool) -> Any:
        ran.append("part")
        if not _becomes(lambda: len(encoded) > min(len(ran), parts - 1)):
            late.append("tokenised")
        return run(self, inputs, layers, pooled)

    def writing(self: CacheWriter, *arguments: Any, **named: Any) -> int:
        wrote.append("part")
        if not _becomes(lambda: len(ran) > min(len(wrote), parts - 1)):
            late.append("written")
        return write(self, *arguments, **named)

    monkeypatch.setattr(dump_run, "encode", encoding)
    monkeypatch.setattr(TorchBackend, "run", running)
    monkeypatch.setattr(CacheWriter, "write_part", writing)
    monkeypatch.setattr(dump_run, "measured_record", lambda *_: {})
    report = local.only("bert").dump("dump.layers=none", cache=tmp_path / "overlapped")
    assert not late
    assert len(encoded) == len(ran) == len(wrote) == parts == report.parts
    assert threading.get_ident() not in encoded


@pytest.mark.parametrize("cores", [2, 4])
def test_on_the_cpu_a_thread_stores_where_the_teacher_leaves_a_core(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has the same bytes; a thread beside passes on all cores would take longer than none."""
    monkeypatch.setattr("kdcache.dump.engine.usable_cores", lambda: cores)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    put, stored_by = HiddenBlock.put, set[int]()

    def putting(self: HiddenBlock, *arguments: Any) -> None:
        stored_by.add(threading.get_ident())
        put(self, *arguments)

    monkeypatch.setattr(HiddenBlock, "put", putting)
    layers = dict(enumerate(form for form in FORMS.values() if not format_of(form).searches))
    bases = {layer: basis(spec) for layer, spec in layers.items()}
    _, found = run_part(exact_texts(), Numbers(), exact_teacher(layers), tuple(layers), bases, lambda _: None)
    assert (threading.get_ident() in stored_by) == (cores == 2)
    assert len(stored_by) == 1
    monkeypatch.undo()
    _, expected = run_part(exact_texts(), Numbers(), exact_teacher(layers), tuple(layers), bases, lambda _: None)
    for layer, block in expected.items():
        np.testing.assert_array_equal(found[layer].values, block.values)


class NumbersElsewhere(Numbers):
    """The same on an accelerator."""

    device = DEVICE.type

    def run(self, inputs: dict[str, torch.Tensor], layers: Sequence[int], pooled: bool) -> TeacherOutput:
        output = super().run(inputs, layers, pooled)
        hidden = {layer: states.to(DEVICE) for layer, states in output.hidden.items()}
        return TeacherOutput(output.logits.to(DEVICE), None, hidden)


@pytest.mark.parametrize("tokens", ["all", "first", "pooled"])
@pytest.mark.parametrize("searches", [False, True])  # in the thread that stores
def test_an_accelerator_is_waited_for_once_per_batch(tokens: TokenSelection, searches: bool) -> None:
    """Whatever the number of layers; and what arrives is what the CPU makes, byte by byte.

    Of two rows of a trellis with equal errors, the search on a device may take the other one.
    """
    batches: TextBatches = exact_texts()
    forms = [form for form in FORMS.values() if searches or not format_of(form).searches]
    layers = {number: replace(form, tokens=tokens) for number, form in enumerate(forms)}
    teacher, bases = exact_teacher(layers), {layer: basis(spec) for layer, spec in layers.items()}
    expected, stored = run_part(batches, Numbers(), teacher, tuple(layers), bases, lambda _: None)
    passes = list[int]()
    with fake_accelerator(), recorded_reads() as reads:
        outputs, hidden = run_part(batches, NumbersElsewhere(), teacher, tuple(layers), bases, passes.append)
    assert len(passes) > 2
    assert len(reads) == len(passes)
    np.testing.assert_array_equal(outputs.logits, expected.logits)
    for layer, block in stored.items():
        if layers[layer].bytes:
            assert np.mean((hidden[layer].values != block.values).any(axis=1)) < 0.05
        else:
            np.testing.assert_array_equal(hidden[layer].values, block.values)
        assert (hidden[layer].scales is None) == (block.scales is None)
        if block.scales is not None:
            np.testing.assert_array_equal(hidden[layer].scales, block.scales)


def test_bases_are_the_same_from_an_accelerator() -> None:
    batches = exact_texts()
    layers = dict(enumerate(FORMS.values()))
    here = fit_bases(batches, Numbers(), layers, 0, lambda _: None)
    with fake_accelerator():
        there = fit_bases(batches, NumbersElsewhere(), layers, 0, lambda _: None)
    for layer, expected in here.items():
        assert there[layer].target_variance == expected.target_variance
        assert (expected.components is None) == (there[layer].components is None)
        if expected.components is not None:
            np.testing.assert_array_equal(there[layer].components, expected.components)


def test_the_states_of_a_batch_are_packed_without_asking_the_device(local: Workbench) -> None:
    """Networks of transformers ask for themselves whether a mask has padding; with more layers there is no more."""
    from kdcache.data.encoding import encode, pad
    from kdcache.teachers.bundle import load_teacher

    teacher = load_teacher(local.teachers, "bert")
    inputs = pad(encode(teacher.tokenizer, [("good",), ("a long and bad film",)], 32), [0, 1], 0)
    counts = []
    with fake_accelerator():
        backend = TorchBackend(teacher, precision="float32")
        for layers in ((), (1,), tuple(range(teacher.depth + 1))):
            with recorded_reads() as reads:
                backend.run(inputs, layers, True)
            counts.append(len(reads))
    assert len(set(counts)) == 1
    assert counts[0] <= 1


def test_tensors_of_all_kinds_arrive_in_one_copy() -> None:
    made = [
        [torch.arange(7, dtype=torch.int8)],
        [torch.tensor([[1.5, -2.0]]), torch.empty(0, 3), torch.tensor([[1.0], [65504.0]]).half()],
        [torch.arange(12, dtype=torch.uint8).reshape(3, 4).T],
    ]
    with fake_accelerator() as device, recorded_reads() as reads:
        arrays = fetch([[tensor.to(device) for tensor in group] for group in made])()
    assert len(reads) == 1
    for group, found in zip(made, arrays, strict=True):
        for tensor, array in zip(group, found, strict=True):
            assert array.dtype == tensor.numpy().dtype
            np.testing.assert_array_equal(array, tensor.numpy())


def test_after_an_error_nothing_that_waits_is_done() -> None:
    """A part whose batch failed must not be handed over to be written."""
    go, ran = threading.Event(), list[int]()

    def fail() -> None:
        go.wait(SECONDS)
        raise ValueError("NaN")

    with pytest.raises(ValueError, match="NaN"), BackgroundWriter[None]("test", ahead=3) as writer:
        writer.start(fail)
        writer.start(lambda: ran.append(1))
        writer.start(lambda: ran.append(2))
        go.set()
    assert not ran


def test_actions_wait_in_a_queue_of_bounded_length() -> None:
    go, started = threading.Event(), list[int]()
    with BackgroundWriter[bool]("test", ahead=2) as writer:
        writer.start(lambda: go.wait(SECONDS))
        writer.start(lambda: go.wait(SECONDS))  # does not wait
        third = threading.Thread(target=lambda: (writer.start(lambda: True), started.append(3)))
        third.start()
        assert not started
        go.set()
        third.join(SECONDS)
        assert started == [3]
