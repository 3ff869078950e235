"""A model is tried on a few made-up texts before time is spent on it.

The hidden states of an unknown model may not be one vector per token and block, and padding may change its outputs.
Both would give wrong students, hours later and without an error. Teachers and students pass the same trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kdcache.data.encoding import EncodedTexts, encode, pad, padding_id
from kdcache.errors import ModelError, NonFiniteError, first_line
from kdcache.teachers.network import run_network

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXTS = ("yes", "a plain sentence of ten or so words, with a comma", "no more than this")
_MAX_PADDING_CHANGE = 1e-2  # relative to the norm of a state; in float32, rounding changes at most 1e-4
KNOWN_MODELS = "Choose a model that docs/models.md lists, e.g. BERT, RoBERTa, DeBERTa, ModernBERT or Qwen."


class Outputs(Protocol):
    """Of a forward pass: logits [batch, classes] or None, hidden states [batch, tokens, width] by layer."""

    @property
    def logits(self) -> Tensor | None: ...

    @property
    def hidden_states(self) -> tuple[Tensor, ...]: ...


def try_network(
    name: str, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, columns: int = 1
) -> float:
    """``try_model`` for the bare network of teacher ``name``, which is in eval mode."""

    def forward(inputs: Mapping[str, Tensor]) -> Outputs:
        return run_network(network, inputs, hidden_states=True)

    return try_model(f"teacher '{name}'", network, forward, tokenizer, max_length, columns)


def try_model(
    subject: str,
    network: Any,
    forward: Callable[[Mapping[str, Tensor]], Outputs],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    columns: int = 1,
    hint: str = KNOWN_MODELS,
) -> float:
    """Run ``forward`` on made-up texts of ``columns`` columns, in one batch and each alone.

    Args:
        subject: the model in messages, e.g. "teacher 'bert'".
        network: the model of transformers, for its config and device.
        forward: runs it on padded inputs [batch, tokens], in eval mode.
        tokenizer: of the model.
        max_length: tokens per text.
        columns: text columns of the task.
        hint: what to do about a model that fails.

    Returns:
        The largest relative change of a hidden state or of a text's logits that padding causes.

    Raises:
        ModelError: if the model fails, if its hidden states are not one vector per token and block, or if a text has
            other outputs alone than in a batch.
        NonFiniteError: for NaN and infinity.
    """
    encoded = encode(tokenizer, [(text,) * columns for text in _TEXTS], max_length)
    device, kind = next(network.parameters()).device, network.config.model_type

    def run(rows: list[int]) -> Outputs:
        inputs = pad(encoded, rows, padding_id(tokenizer))
        return forward({key: tensor.to(device) for key, tensor in inputs.items()})

    try:
        with torch.no_grad():
            together = run(list(range(len(encoded))))
            _check_states(subject, network.config, together, encoded, hint)
            alone = [run([row]) for row in range(len(encoded))]
    except ModelError:
        raise
    except Exception as error:  # whatever a model that was not made for this raises
        raise ModelError(
            f"{subject}: its model, of type '{kind}', fails on a made-up text: "
            f"{type(error).__name__}: {first_line(error)}",
            hint,
        ) from error
    changes = [
        _relative_change(*pair)
        for row, output in enumerate(alone)
        for pair in _pairs(together, output, row, int(encoded.lengths[row]))
    ]
    if not all(math.isfinite(change) for change in changes):
        raise NonFiniteError(f"{subject} gives NaN or infinity on a made-up text", "Use a checkpoint without NaN.")
    if max(changes) > _MAX_PADDING_CHANGE:
        raise ModelError(
            f"{subject}: the outputs of its model, of type '{kind}', change by {max(changes):.0%} of their size when a "
            f"text is padded; {_MAX_PADDING_CHANGE:.0%} is accepted",
            hint,
        )
    return max(changes)


def _check_states(subject: str, config: Any, output: Outputs, encoded: EncodedTexts, hint: str) -> None:
    depth = int(config.num_hidden_layers)
    expected = (len(encoded), int(encoded.lengths.max()), int(config.hidden_size))
    shapes = [tuple(states.shape) for states in output.hidden_states]
    if shapes == [expected] * (depth + 1):
        return
    other = next((shape for shape in shapes if shape != expected), None)
    what = f"one of shape {other}, expected {expected}" if other else f"{len(shapes)} of them, expected {depth + 1}"
    raise ModelError(
        f"{subject}: the hidden states of its model, of type '{config.model_type}', are not one vector per token and "
        f"block: {what}",
        hint,
    )


def first_token_sees_only_itself(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> bool:
    """Whether the first token's last state is the same for another second token, as it is in a causal decoder."""
    inputs = pad(encode(tokenizer, [(_TEXTS[1],)], max_length), [0], padding_id(tokenizer))
    if inputs["input_ids"].shape[1] < 2:
        return False
    changed = inputs["input_ids"].clone()
    changed[0, 1] = (changed[0, 1] + 1) % int(network.config.vocab_size)
    device = next(network.parameters()).device
    states = []
    with torch.no_grad():
        for ids in (inputs["input_ids"], changed):
            placed = {name: tensor.to(device) for name, tensor in {**inputs, "input_ids": ids}.items()}
            states.append(run_network(network, placed, hidden_states=True).hidden_states[-1][:, 0])
    return _relative_change(states[0], states[1]) < 1e-6


def _pairs(together: Outputs, alone: Outputs, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
    states = zip(together.hidden_states, alone.hidden_states, strict=True)
    pairs = [(batch[row, :length], single[0]) for batch, single in states]
    if together.logits is not None and alone.logits is not None:
        pairs.append((together.logits[row : row + 1], alone.logits))
    return pairs


def _relative_change(rows: Tensor, others: Tensor) -> float:
    """The largest norm of a row's difference, relative to the norm of the row in ``others``; both [rows, width]."""
    rows, others = rows.double(), others.double()
    return float(((rows - others).norm(dim=-1) / others.norm(dim=-1).clamp_min(1e-3)).max())
