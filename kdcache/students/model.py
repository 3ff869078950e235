"""The student: an encoder, or a causal decoder, with one of two heads.

``standard`` is an ``AutoModelForSequenceClassification`` and loads with transformers alone. ``shared`` is that of the
paper: the pooling and prediction layer that the teachers share (MT-BERT, section 3.1), copied from them, behind an
adapter where the widths differ. Both look the same to training: inputs in, logits and hidden states out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from kdcache.teachers.network import accepted_inputs, run_network

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from kdcache.teachers.head import SharedHead

HeadKind = Literal["standard", "shared"]


@dataclass(frozen=True)
class StudentOutput:
    """``logits`` float32 [batch, classes]; ``hidden_states`` [batch, tokens, width] by layer, 0 = embeddings."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]


class StudentModel(nn.Module):
    """A model with a head.

    ``network`` is the classifier of transformers, or the model without head where the head is shared.
    """

    def __init__(
        self, network: PreTrainedModel, head: SharedHead | None = None, adapter: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.adapter = adapter
        self.accepted = accepted_inputs(network)
        self.full_mask = False  # of a network that ``takes_full_mask``, while it trains on an accelerator

    @property
    def head_kind(self) -> HeadKind:
        return "standard" if self.head is None else "shared"

    @property
    def config(self) -> PretrainedConfig:
        return self.network.config

    @property
    def width(self) -> int:
        """Dimensions of a hidden state."""
        return int(self.config.hidden_size)

    @property
    def depth(self) -> int:
        """Number of blocks; ``hidden_states[depth]`` is the output of the last."""
        return int(self.config.num_hidden_layers)

    def forward(self, inputs: Mapping[str, Tensor], *, hidden_states: bool = False) -> StudentOutput:
        """Run on ``input_ids`` and ``attention_mask`` [batch, tokens], padded on the right, and ``token_type_ids``."""
        taken = inputs
        if self.full_mask and self.training:
            taken = {**inputs, "attention_mask": _full_mask(inputs["attention_mask"])}
        output = run_network(self.network, taken, hidden_states=hidden_states)
        if self.head is None:
            assert output.logits is not None
            return StudentOutput(output.logits.float(), output.hidden_states)
        assert output.last is not None
        last = output.last if self.adapter is None else self.adapter(output.last)
        logits, _ = self.head(last, inputs["attention_mask"])
        return StudentOutput(logits.float(), output.hidden_states)


def takes_full_mask(model: StudentModel, max_length: int) -> bool:
    """Whether the network gives the same for a mask [batch, 1, tokens, tokens], tried on made-up ids.

    These have ``max_length`` tokens: networks whose tokens read only their neighbours differ for long texts.

    With a mask [batch, tokens] transformers asks in every forward pass whether anything is padding, and an accelerator
    waits for the answer.
    """
    device = next(model.parameters()).device
    places = torch.arange(max_length, device=device)
    mask = torch.stack([places >= 0, places < (max_length + 1) // 2]).long()
    inputs = {"input_ids": (5 + places % 5) * mask, "attention_mask": mask}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            plain, full = (
                run_network(model.network, inputs | {"attention_mask": given}, hidden_states=True)
                for given in (mask, _full_mask(mask))
            )
    except Exception:  # whatever a model raises: it does not take it
        return False
    finally:
        model.train(training)
    pairs = [
        (one[mask.bool()], other[mask.bool()])
        for one, other in zip(plain.hidden_states, full.hidden_states, strict=True)
    ]
    if plain.logits is not None and full.logits is not None:
        pairs.append((plain.logits, full.logits))
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max())) for one, other in pairs)


def _full_mask(mask: Tensor) -> Tensor:
    """Which token may read which: bool [batch, 1, tokens, tokens] from [batch, tokens]."""
    rows, tokens = mask.shape
    return mask.bool()[:, None, None, :].expand(rows, 1, tokens, tokens)


@dataclass(frozen=True)
class Student:
    """A student with what it takes to use it; ``source`` says where its weights came from."""

    model: StudentModel
    tokenizer: PreTrainedTokenizerBase
    label_names: tuple[str, ...]
    max_length: int  # tokens
    source: str
    own_code: bool = False  # Python code of its own was run to load it

    @property
    def parameters(self) -> int:
        """Trainable parameters, embeddings included."""
        return sum(parameter.numel() for parameter in self.model.parameters())
