"""Hidden targets: aligned sums, quantised values, micro-batches, and tensors that move once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.loading.targets import Batch, Hidden, Targets


def ragged(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Attention mask and flat places of valid tokens."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return mask, mask.flatten().nonzero().flatten()


def batch(lengths: list[int], *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """Two teachers, two student layers.

    One with the student's own tokens, one aligned with two entries or none per token.
    """
    rng = torch.Generator().manual_seed(seed)
    mask, places = ragged(lengths)
    own = Hidden(torch.randn(len(places), 5, generator=rng), None, None, None, None, places)
    covered = places[torch.arange(len(places)) % 3 != 1]
    first = 2 * torch.arange(len(covered))
    rows = covered // mask.shape[1]
    starts = torch.cumsum(torch.tensor([0, *lengths]), 0)[:-1]
    src = torch.stack([starts[rows], starts[rows] + torch.tensor(lengths)[rows] - 1], 1).flatten()
    weight = torch.tensor([0.25, 0.75]).repeat(len(covered))
    scales = torch.rand(len(places), generator=rng) if dtype == torch.int8 else None
    layers = []
    for _ in range(2):
        values = torch.randn(len(places), 4, generator=rng) * 20
        layers.append(Hidden(values.to(dtype), scales, src, first, weight, covered))
    hidden = {(0, 1): own, (0, 2): own, (1, 1): layers[0], (1, 2): layers[1]}
    targets = Targets(("a", "b"), torch.randn(2, len(lengths), 3, generator=rng), hidden)
    inputs = {"input_ids": torch.randint(1, 9, mask.shape, generator=rng) * mask, "attention_mask": mask}
    return Batch(
        inputs, torch.arange(len(lengths)), np.arange(len(lengths) * 16, dtype=np.uint8).reshape(-1, 16), targets
    )


def plain(hidden: Hidden) -> Tensor:
    values = hidden.values.double() * (1 if hidden.scales is None else hidden.scales.double()[:, None])
    if hidden.src is None or hidden.first is None or hidden.weight is None:
        return values
    bounds = itertools.pairwise([*hidden.first.tolist(), len(hidden.src)])
    return torch.stack([hidden.weight[low:high].double() @ values[hidden.src[low:high]] for low, high in bounds])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_aligned_is_the_weighted_sum(dtype: torch.dtype) -> None:
    targets = batch([4, 7, 1], dtype=dtype).targets
    assert targets is not None
    for hidden in targets.hidden.values():
        aligned = hidden.aligned()
        assert aligned.dtype == torch.float32
        torch.testing.assert_close(aligned.double(), plain(hidden), rtol=1e-5, atol=1e-5)


def test_the_identity_copies_nothing() -> None:
    targets = batch([3, 2]).targets
    assert targets is not None
    assert targets.hidden[0, 1].aligned().data_ptr() == targets.hidden[0, 1].values.data_ptr()


def test_no_covered_token_is_an_empty_target() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert Hidden(torch.randn(3, 4), None, none, none, torch.empty(0), none).aligned().shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 9])
def test_micro_batches_hold_the_rows_of_the_batch(pieces: int, dtype: torch.dtype) -> None:
    whole = batch([4, 7, 1, 2, 6], dtype=dtype)
    split = whole.split(pieces)
    assert len(split) == min(pieces, 5)
    assert torch.equal(torch.cat([piece.labels for piece in split]), whole.labels)
    assert np.array_equal(np.concatenate([piece.text_ids for piece in split]), whole.text_ids)
    assert whole.targets is not None
    length = whole.inputs["input_ids"].shape[1]
    ids = whole.inputs["input_ids"].flatten()
    for key, hidden in whole.targets.hidden.items():
        aligned, tokens = [], []
        for piece in split:
            assert piece.targets is not None
            mine = piece.targets.hidden[key]
            aligned.append(mine.aligned())
            tokens.append(piece.inputs["input_ids"].flatten()[mine.positions])
            assert piece.inputs["input_ids"].shape[1] == int(piece.inputs["attention_mask"].sum(1).max())
        torch.testing.assert_close(torch.cat(aligned), hidden.aligned())
        assert torch.equal(torch.cat(tokens), ids[hidden.positions]), f"positions in rows of {length}"
    logits = [piece.targets.logits for piece in split if piece.targets is not None]
    assert torch.equal(torch.cat(logits, 1), whole.targets.logits)


def test_shared_tensors_move_once() -> None:
    moved = batch([3, 5]).to("meta")
    assert moved.targets is not None
    assert moved.targets.hidden[1, 1].src is moved.targets.hidden[1, 2].src
    assert moved.targets.hidden[0, 1].values is moved.targets.hidden[0, 2].values
    assert moved.inputs["input_ids"].device.type == moved.labels.device.type == "meta"
    without = Batch({"attention_mask": torch.ones(2, 3)}, torch.zeros(2), np.zeros((2, 16), np.uint8), None)
    assert without.to("meta").targets is None
    assert without.split(2)[1].targets is None
