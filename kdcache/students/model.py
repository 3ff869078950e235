"""The student: an encoder, or a causal decoder, with one of two heads.

``standard`` is an ``AutoModelForSequenceClassification`` and loads with transformers alone. ``shared`` is that of the
paper: the pooling and prediction layer that the teachers share (MT-BERT, section 3.1), copied from them, behind an
adapter where the widths differ. Both look the same to training: inputs in, logits and hidden states out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from kdcache.teachers.network import accepted_inputs, full_mask, run_network

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
            taken = {**inputs, "attention_mask": full_mask(inputs["attention_mask"])}
        output = run_network(self.network, taken, hidden_states=hidden_states)
        if self.head is None:
            assert output.logits is not None
            return StudentOutput(output.logits.float(), output.hidden_states)
        assert output.last is not None
        last = output.last if self.adapter is None else self.adapter(output.last)
        logits, _ = self.head(last, inputs["attention_mask"])
        return StudentOutput(logits.float(), output.hidden_states)


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
