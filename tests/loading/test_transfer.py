"""A step goes to the device in one copy, and every value and stride there is that of the host."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdcache.data.encoding import load_tokenizer
from kdcache.loading.cached import loader
from kdcache.loading.targets import Batch, Hidden, Targets
from kdcache.loading.transfer import on_device, pack
from kdcache.testing.accelerator import DEVICE, fake_accelerator, recorded_transfers
from tests.conftest import TinyRun

DTYPES = (torch.int8, torch.uint8, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)


def tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    batch.mapped(lambda tensor: (found.append(tensor), tensor)[1])
    return found


def assert_equal(moved: Batch, batch: Batch) -> None:
    there, here = tensors(moved), tensors(batch)
    assert len(there) == len(here)
    for found, expected in zip(there, here, strict=True):
        assert found.device == DEVICE
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert found.cpu().contiguous().view(-1).tolist() == expected.contiguous().view(-1).tolist()
    assert moved.text_ids is batch.text_ids


def any_batch(values: Mapping[tuple[int, int], Tensor], scales: Tensor | None = None) -> Batch:
    positions = torch.arange(3)
    hidden = {key: Hidden(value, scales, None, None, None, positions) for key, value in values.items()}
    targets = Targets(("a", "b"), torch.randn(2, 4, 3).swapaxes(0, 1)[:2], hidden)
    inputs = {"input_ids": torch.arange(24).reshape(4, 6)[:, :5], "attention_mask": torch.ones(4, 5).long()}
    return Batch(inputs, torch.tensor([0, 1, -1, 2]), np.zeros((4, 16), np.uint8), targets)


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 5), st.integers(0, 9), st.integers(1, 3)), max_size=6)
)
def test_all_dtypes_shapes_and_strides(shapes: list[tuple[torch.dtype, int, int, int]]) -> None:
    values = {
        (0, number): torch.randint(0, 2, (rows, width * step)).to(dtype)[:, ::step]
        for number, (dtype, rows, width, step) in enumerate(shapes)
    }
    batch = any_batch(values)
    with fake_accelerator(), recorded_transfers() as sent:
        (moved,) = pack([batch]).to(DEVICE)
    assert len(sent) == 1
    with fake_accelerator():
        assert_equal(moved, batch)


def test_interleaved_layers_are_sent_once_and_shared_tensors_stay_shared() -> None:
    records = np.zeros(1000, np.dtype([("values 1", "i1", (12,)), ("scales 1", "f4"), ("values 2", "i1", (12,))]))
    records["values 1"], records["scales 1"] = 3, np.arange(1000)
    layers = {(0, layer): torch.from_numpy(records[f"values {layer}"]) for layer in (1, 2)}
    batch = any_batch(layers, torch.from_numpy(records["scales 1"]))
    packed = pack([batch])
    assert packed.buffer.nbytes < records.nbytes + 1500
    with fake_accelerator():
        (moved,) = packed.to(DEVICE)
        assert_equal(moved, batch)
    assert moved.targets is not None
    assert moved.targets.hidden[0, 1].positions is moved.targets.hidden[0, 2].positions


def test_numbers_at_odd_addresses() -> None:
    odd = torch.frombuffer(bytearray(41), dtype=torch.uint8)[1:].numpy()[: 4 * 9].view(np.float32)
    odd[:] = np.arange(9)
    batch = any_batch({(0, 1): torch.from_numpy(odd).reshape(3, 3)})
    with fake_accelerator():
        assert_equal(batch.to(DEVICE), batch)


@pytest.mark.parametrize("pieces", [1, 3])
def test_batches_of_a_cache(tiny_run: TinyRun, pieces: int) -> None:
    source = loader(tiny_run.cache, load_tokenizer(str(tiny_run.teachers / "bert")), batch_size=12, student_layers=2)
    batches = [batch.split(pieces) for batch in source.batches(0)]
    assert len({id(tensor) for tensor in tensors(batches[0][0])}) > 15
    with fake_accelerator(), recorded_transfers() as sent:
        moved = [pack(batch).to(DEVICE) for batch in batches]
    assert len(sent) == len(batches)
    with fake_accelerator():
        for there, here in zip(moved, batches, strict=True):
            for found, expected in zip(there, here, strict=True):
                assert_equal(found, expected)


def test_steps_are_copied_ahead_in_order_and_a_break_ends_the_thread() -> None:
    made: list[int] = []

    def steps() -> Iterator[tuple[int, list[Batch]]]:
        for number in range(50):
            made.append(number)
            yield number, [any_batch({(0, 1): torch.full((3, 2), number)})]

    before = threading.active_count()
    with fake_accelerator() as device:
        for number, (batch,) in on_device(steps, device):
            assert batch.targets is not None
            assert int(batch.targets.hidden[0, 1].values.cpu()[0, 0]) == number
            if number == 7:
                break
    assert 8 <= len(made) <= 12
    assert threading.active_count() == before


def test_an_error_of_the_thread_is_raised_where_the_steps_are_used() -> None:
    def steps() -> Iterator[tuple[int, list[Batch]]]:
        yield 0, [any_batch({})]
        raise ValueError("here")

    with fake_accelerator() as device, pytest.raises(ValueError, match="here"):
        list(on_device(steps, device))


def test_a_process_that_ends_with_steps_on_their_way_ends_in_peace() -> None:
    """Also where the thread's iterator and what holds it are a cycle, which is not collected before the threads end."""
    code = (
        "import itertools\n"
        "import torch\n"
        "from kdcache.loading.transfer import on_device\n"
        "class Holder:\n"
        "    def steps(self):\n"
        "        yield from ((number, []) for number in itertools.count() if self)\n"
        "holder = Holder()\n"
        "holder.fed = on_device(holder.steps, torch.device('cpu'))\n"
        "print(next(holder.fed))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(0, ())\n", "")
