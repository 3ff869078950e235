"""The shared head: one pooling and one dense prediction layer for all teachers (MT-BERT, section 3.1).

All teachers share these parameters, so their representations lie in one space. That makes the hidden states of several
teachers a consistent target for one student.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.teachers.network import at_last_token

if TYPE_CHECKING:
    from kdcache.teachers.teacher import TeacherModel

Pooling = Literal["attention", "cls", "mean", "last"]
POOLINGS: tuple[Pooling, ...] = ("attention", "cls", "mean", "last")
_INITIAL_RANGE = 0.02  # of BERT


class AttentionPooling(nn.Module):
    """softmax(q · tanh(W h)) over the valid tokens, as weights of their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.query = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.dense.weight, std=_INITIAL_RANGE)
        nn.init.zeros_(self.dense.bias)
        nn.init.normal_(self.query, std=_INITIAL_RANGE)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, tokens, width] and [batch, tokens] to [batch, width]."""
        scores = (torch.tanh(self.dense(hidden)) @ self.query).to(_wide(hidden))
        weights = torch.softmax(scores.masked_fill(attention_mask == 0, -torch.inf), dim=1)
        return torch.einsum("bl,blw->bw", weights.to(hidden.dtype), hidden)


class FirstToken(nn.Module):
    """The vector of the first token ([CLS], <s>)."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:  # noqa: ARG002 - all poolings are called alike
        """[batch, tokens, width] to [batch, width]."""
        return hidden[:, 0]


class LastToken(nn.Module):
    """The vector of the last token of each text; in a causal decoder, only this token sees the whole text."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, tokens, width] and [batch, tokens], padded on either side, to [batch, width]."""
        return at_last_token(hidden, attention_mask)


class MeanPooling(nn.Module):
    """The mean over the valid tokens."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, tokens, width] and [batch, tokens] to [batch, width]."""
        mask = attention_mask.to(hidden.dtype).unsqueeze(-1)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def _wide(hidden: Tensor) -> torch.dtype:
    """The dtype of softmax over tokens: at least float32."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _new_pooling(pooling: Pooling, width: int) -> nn.Module:
    if pooling == "attention":
        return AttentionPooling(width)
    return {"cls": FirstToken, "last": LastToken, "mean": MeanPooling}[pooling]()


class SharedHead(nn.Module):
    """Pooling, dropout, dense layer. ``width`` is that of the shared space, ``classes`` the number of labels."""

    def __init__(self, width: int, classes: int, pooling: Pooling = "attention", dropout: float = 0.1) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ModelError(
                f"pooling '{pooling}' is not known; expected one of {', '.join(POOLINGS)}", "Set cofinetune.pooling."
            )
        self.width, self.classes, self.pooling_name, self.dropout_rate = width, classes, pooling, dropout
        self.pooling = _new_pooling(pooling, width)
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(width, classes)
        nn.init.normal_(self.dense.weight, std=_INITIAL_RANGE)
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, tokens, width] and [batch, tokens] to logits [batch, classes] and pooled [batch, width]."""
        pooled = self.pooling(hidden, attention_mask)
        return self.dense(self.dropout(pooled)), pooled


def new_adapter(encoder_width: int, shared_width: int) -> nn.Linear | None:
    """The adapter A_i: a linear map without bias, or None for an encoder of the shared width.

    The encoder's last layer norm has a bias already. The initial weight is a semi-orthogonal matrix, which maps states
    of a narrower encoder to the shared space without changing their geometry.
    """
    if encoder_width == shared_width:
        return None
    adapter = nn.Linear(encoder_width, shared_width, bias=False)
    nn.init.orthogonal_(adapter.weight)
    return adapter


def head_modules(model: TeacherModel) -> tuple[nn.Module, ...]:
    """The modules that make logits of the last hidden states; none for a classifier that does not set its head apart.

    They are the adapter and the shared head, or the modules of a classifier behind its encoder.
    """
    if model.head is not None:
        return tuple(module for module in (model.adapter, model.head) if module is not None)
    network, base = model.encoder, model.encoder.base_model
    if base is network:
        return ()
    own = [child for child in network.children() if child is not base]
    own += [child for name, child in base.named_children() if name == "pooler"]
    return tuple(own) if any(True for child in own for _ in child.parameters()) else ()


@contextlib.contextmanager
def in_float32(modules: Sequence[nn.Module], device: str) -> Iterator[None]:
    """While the block runs, ``modules`` get their floating point inputs in float32 and run without autocast."""
    for module in modules:
        module.forward = _in_float32(module.forward, device)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # that of the class is there again


def _in_float32(forward: Callable[..., Any], device: str) -> Callable[..., Any]:
    def run(*inputs: Any, **named: Any) -> Any:
        inputs, named = tuple(map(_float32, inputs)), {name: _float32(value) for name, value in named.items()}
        if not torch.is_autocast_enabled(device):
            return forward(*inputs, **named)
        with torch.autocast(device, enabled=False):
            return forward(*inputs, **named)

    return run


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
