"""Pooling and the shared head."""

from __future__ import annotations

import pytest
import torch

from kdcache.errors import ModelError
from kdcache.teachers.head import POOLINGS, SharedHead, new_adapter


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_does_not_change_anything(pooling: str) -> None:
    torch.manual_seed(0)
    head = SharedHead(6, 3, pooling).eval()  # type: ignore[arg-type]
    hidden = torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    logits, pooled = head(hidden, mask)
    assert (logits.shape, pooled.shape) == ((2, 3), (2, 6))
    other = hidden.clone()
    other[0, 3:] = 1e4
    assert torch.equal(head(other, mask)[0], logits)
    alone, _ = head(hidden[:1, :3], mask[:1, :3])
    torch.testing.assert_close(alone, logits[:1])


def test_attention_is_the_paper_formula() -> None:
    torch.manual_seed(0)
    head = SharedHead(4, 2, "attention").double().eval()
    hidden = torch.randn(1, 3, 4, dtype=torch.float64)
    W, b, q = head.pooling.dense.weight, head.pooling.dense.bias, head.pooling.query
    weights = torch.softmax(torch.tanh(hidden[0] @ W.T + b) @ q, dim=0)
    logits, pooled = head(hidden, torch.ones(1, 3))
    torch.testing.assert_close(pooled[0], (weights[:, None] * hidden[0]).sum(dim=0))
    torch.testing.assert_close(logits, head.dense(pooled))


def test_cls_and_mean() -> None:
    hidden = torch.arange(12.0).reshape(1, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0]])
    assert SharedHead(3, 2, "cls").eval()(hidden, mask)[1].tolist() == [[0.0, 1.0, 2.0]]
    assert SharedHead(3, 2, "mean").eval()(hidden, mask)[1].tolist() == [[1.5, 2.5, 3.5]]


def test_last_is_the_last_token_on_either_side_of_the_padding() -> None:
    head = SharedHead(3, 2, "last").eval()
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    assert head(hidden, mask)[1].tolist() == [[3.0, 4.0, 5.0], [21.0, 22.0, 23.0]]
    assert torch.equal(head(hidden.flip(1), torch.ones(2, 4))[1], hidden[:, 0])


def test_dropout_only_in_training() -> None:
    head = SharedHead(8, 2, "mean", dropout=0.5)
    hidden, mask = torch.randn(1, 2, 8), torch.ones(1, 2)
    assert not torch.equal(head(hidden, mask)[0], head(hidden, mask)[0])
    head.eval()
    assert torch.equal(head(hidden, mask)[0], head(hidden, mask)[0])


def test_an_unknown_pooling_names_those_there_are() -> None:
    with pytest.raises(ModelError, match=r"max.*attention, cls, mean"):
        SharedHead(4, 2, "max")  # type: ignore[arg-type]


def test_adapters_only_where_widths_differ() -> None:
    assert new_adapter(8, 8) is None
    adapter = new_adapter(4, 8)
    assert adapter is not None
    assert adapter.bias is None
    states = torch.randn(5, 4)
    torch.testing.assert_close(adapter(states) @ adapter(states).T, states @ states.T)  # geometry is kept
