"""Gradients by row are those of torch bit for bit, over micro-batches, and nothing of the model changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcache.training.row_gradients import RowGradients


def network(rows: int = 2000, padding: int | None = 0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(rows, 6, padding_idx=padding), nn.Linear(6, 3), nn.Tanh())


def gradients(model: nn.Module, batches: Sequence[Tensor], *, by_row: bool) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    collected = RowGradients(model) if by_row else None
    for ids in batches:
        model(ids).square().sum().backward()
    if collected is not None:
        collected.gather()
        collected.close()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=30), min_size=1, max_size=4),
    st.sampled_from([None, 0, 7]),
)
def test_every_bit_is_that_of_the_dense_gradient(batches: list[list[int]], padding: int | None) -> None:
    model = network(padding=padding)
    ids = [torch.tensor(batch).reshape(1, -1) for batch in batches]
    dense, by_row = (gradients(model, ids, by_row=each) for each in (False, True))
    assert len(dense) == len(by_row) == 3
    for expected, found in zip(dense, by_row, strict=True):
        assert torch.equal(expected, found)


def test_a_matrix_that_is_used_twice_gets_both_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(1500, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids) @ self.words.weight.T

    ids = [torch.tensor([[3, 3, 9]]), torch.tensor([[9, 1400]])]
    dense, by_row = (gradients(Tied(), ids, by_row=each) for each in (False, True))
    torch.testing.assert_close(by_row, dense)


def test_no_dense_gradient_is_made_by_a_backward_pass_and_the_module_is_left_as_it_was() -> None:
    model = network()
    state = list(model.state_dict())
    collected = RowGradients(model)
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model[0].weight.grad is None
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    collected.gather()
    assert model[0].weight.grad is not None
    collected.close()
    assert "forward" not in vars(model[0])
    assert list(model.state_dict()) == state


@pytest.mark.parametrize("change", ["frozen", "small", "sparse"])
def test_other_embeddings_are_left_alone(change: str) -> None:
    model = network(rows=20 if change == "small" else 2000)
    model[0].weight.requires_grad_(change != "frozen")
    model[0].sparse = change == "sparse"
    RowGradients(model)
    assert "forward" not in vars(model[0])
