"""A model is tried on a few made-up texts before anything is spent on it.

The hidden states of an unknown model may not be one per token and block, and padding may change its outputs. Both would
give wrong students without an error, hours later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdcache.data.encoding import EncodedTexts, encode, pad, padding_id
from kdcache.errors import ModelError, NonFiniteError
from kdcache.teachers.network import NetworkOutput, run_network

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXTS = ("yes", "a plain sentence of ten or so words, with a comma", "no more than this")
_MOST = 1e-2  # that padding may change, relative to the size of a state: float32 changes by 1e-4 at most
_OTHERS = "Choose a model that docs/models.md lists, e.g. BERT, RoBERTa, DeBERTa, ModernBERT or Qwen."


@dataclass(frozen=True)
class Trial:
    """``causal``: no token sees those after it. ``padding``: the largest relative change that padding made in states
    and logits.
    """

    causal: bool
    padding: float


def try_network(
    name: str, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, columns: int = 1
) -> Trial:
    """Run the model of teacher ``name``, which is in eval mode, on made-up texts of ``columns`` columns, together and
    alone.

    Raises ModelError where that fails, where the hidden states are not one vector per token and block, or where a text
    gives other outputs alone than in a batch; NonFiniteError for NaN and infinity.
    """
    encoded = encode(tokenizer, [(text,) * columns for text in _TEXTS], max_length)
    filler = padding_id(tokenizer)
    try:
        with torch.no_grad():
            together = _run(network, encoded, list(range(len(encoded))), filler)
            _check_states(name, network, together, encoded)
            alone = [_run(network, encoded, [row], filler) for row in range(len(encoded))]
            causal = is_causal(network, encoded.select([1]), filler)
    except ModelError:
        raise
    except Exception as error:  # whatever a model that was not made for this raises
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ModelError(
            f"teacher '{name}': its model, of type '{network.config.model_type}', fails on a made-up text: "
            f"{type(error).__name__}: {reason}",
            _OTHERS,
        ) from error
    changes = [
        _change(pair) for row, one in enumerate(alone) for pair in _pairs(together, one, row, int(encoded.lengths[row]))
    ]
    worst = max(changes)
    if not all(math.isfinite(change) for change in changes):
        raise NonFiniteError(
            f"teacher '{name}' gives NaN or infinity, already on a made-up text", "Give a checkpoint that is sound."
        )
    if worst > _MOST:
        raise ModelError(
            f"teacher '{name}': the outputs of its model, of type '{network.config.model_type}', change by {worst:.0%} "
            "of their size when a "
            f"text is padded; {_MOST:.0%} is accepted",
            _OTHERS,
        )
    return Trial(causal, worst)


def _run(network: PreTrainedModel, encoded: EncodedTexts, rows: list[int], filler: int) -> NetworkOutput:
    device = next(network.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in pad(encoded, rows, filler).items()}
    return run_network(network, inputs, hidden_states=True)


def _check_states(name: str, network: PreTrainedModel, output: NetworkOutput, encoded: EncodedTexts) -> None:
    depth, width = int(network.config.num_hidden_layers), int(network.config.hidden_size)
    wanted = [(len(encoded), int(encoded.lengths.max()), width)] * (depth + 1)
    found = [tuple(states.shape) for states in output.hidden_states]
    if found != wanted:
        odd = next((shape for shape in found if shape != wanted[0]), None)
        what = (
            f"one of shape {odd} where {wanted[0]} was expected"
            if odd
            else f"{len(found)} of them, expected {depth + 1}"
        )
        raise ModelError(
            f"teacher '{name}': the hidden states of its model, of type '{network.config.model_type}', are not one "
            "vector per token and "
            f"block: {what}",
            _OTHERS,
        )


def is_causal(network: PreTrainedModel, text: EncodedTexts, filler: int) -> bool:
    """Whether the first token's last state stays as it is when the second token is another one.

    ``text`` is one text.
    """
    inputs = pad(text, [0], filler)
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
    return _change((states[0], states[1])) < 1e-6


def _pairs(together: NetworkOutput, alone: NetworkOutput, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
    states = zip(together.hidden_states, alone.hidden_states, strict=True)
    pairs = [(many[row, :length], one[0]) for many, one in states]
    if together.logits is not None and alone.logits is not None:
        pairs.append((together.logits[row : row + 1], alone.logits))
    return pairs


def _change(pair: tuple[Tensor, Tensor]) -> float:
    """The largest norm of a row's difference, relative to that of the row; rows [n, width]."""
    one, other = (tensor.double() for tensor in pair)
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-3)).max())
