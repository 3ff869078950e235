"""Runs a model of transformers on padded texts, so that a text has the same outputs alone and in a batch.

kdcache pads on the right, whatever the tokenizer says. That is correct for encoders (positions count from the first
token) and for causal decoders (no token sees the following ones). Three kinds of models need more:

- Heads that read the last position (XLNet): inputs are padded on the left, and hidden states moved back.
- Heads that read the last token that is not padding (GPT-2, Llama, Qwen): padding gets the padding id of the config.
- The same heads without a padding id in the config: transformers would read the last position. Here the head reads the
  last token of each text by the attention mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class NetworkOutput:
    """Outputs of a forward pass.

    ``logits`` [batch, classes] of a classifier, else None. ``last`` [batch, tokens, width] is the last hidden state,
    None for a classifier without ``hidden_states``. These are empty unless requested.
    """

    logits: Tensor | None
    last: Tensor | None
    hidden_states: tuple[Tensor, ...]


def accepted_inputs(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that the model's ``forward`` takes.

    Token types are excluded if the model has one type only (RoBERTa): the second type of a pair would be out of range.
    """
    known = {"input_ids", "attention_mask", "token_type_ids"}
    types = getattr(getattr(model, "config", None), "type_vocab_size", None)
    if isinstance(types, int) and types < 2:
        known.remove("token_type_ids")
    return frozenset(known & set(inspect.signature(model.forward).parameters))


def run_network(network: PreTrainedModel, inputs: Mapping[str, Tensor], *, hidden_states: bool) -> NetworkOutput:
    """Run an encoder or a classifier on ``inputs`` [batch, tokens], padded on the right; so are the states it returns.

    ``hidden_states``: index 0 embeddings, k after block k.
    """
    accepted, mask = accepted_inputs(network), inputs["attention_mask"]
    taken: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if name in accepted}
    options: dict[str, Any] = {"output_hidden_states": hidden_states, "return_dict": True}
    if "use_cache" in inspect.signature(network.forward).parameters:
        options["use_cache"] = False  # no keys and values for generation
    if reads_last_position(network):
        output = network(**{name: padded_left(tensor, mask) for name, tensor in taken.items()}, **options)
        states = tuple(padded_right(state, mask) for state in output.hidden_states) if hidden_states else ()
        return NetworkOutput(output.logits, states[-1] if states else None, states)
    if _reads_last_token(network):
        padding = network.config.get_text_config().pad_token_id
        if padding is None or padding < 0:
            output = network.base_model(**taken, **options)
            states = tuple(output.hidden_states) if hidden_states else ()
            score: Any = network.score
            return NetworkOutput(score(at_last_token(output.last_hidden_state, mask)), output.last_hidden_state, states)
        taken["input_ids"] = taken["input_ids"].masked_fill(mask == 0, padding)
    output = network(**taken, **options)
    states = tuple(output.hidden_states) if hidden_states else ()
    last = getattr(output, "last_hidden_state", None)
    return NetworkOutput(getattr(output, "logits", None), states[-1] if last is None and states else last, states)


def takes_full_mask(network: PreTrainedModel, max_length: int) -> bool:
    """Whether the network gives the same for a mask [batch, 1, tokens, tokens], tried on made-up ids.

    These have ``max_length`` tokens: networks whose tokens read only their neighbours differ for long texts.

    With a mask [batch, tokens] transformers asks in every forward pass whether anything is padding, and an accelerator
    waits for the answer.
    """
    places = torch.arange(max_length, device=next(network.parameters()).device)
    mask = torch.stack([places >= 0, places < (max_length + 1) // 2]).long()
    inputs = {"input_ids": (5 + places % 5) * mask, "attention_mask": mask}
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            plain, full = (
                run_network(network, inputs | {"attention_mask": given}, hidden_states=True)
                for given in (mask, full_mask(mask))
            )
    except Exception:  # whatever a model raises: it does not take it
        return False
    finally:
        network.train(training)
    pairs = [
        (one[mask.bool()], other[mask.bool()])
        for one, other in zip(plain.hidden_states, full.hidden_states, strict=True)
    ]
    if plain.logits is not None and full.logits is not None:
        pairs.append((plain.logits, full.logits))
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max())) for one, other in pairs)


def full_mask(mask: Tensor) -> Tensor:
    """Which token may read which: bool [batch, 1, tokens, tokens] from [batch, tokens]."""
    rows, tokens = mask.shape
    return mask.bool()[:, None, None, :].expand(rows, 1, tokens, tokens)


def reads_last_position(network: PreTrainedModel) -> bool:
    """Whether the classifier's head reads the last position, be it a token or padding (XLNet)."""
    return hasattr(network, "sequence_summary") and getattr(network.config, "summary_type", None) == "last"


def head_reads_the_end(network: PreTrainedModel) -> bool:
    """Whether the classifier's head reads the last token of a text."""
    return reads_last_position(network) or _reads_last_token(network)


def _reads_last_token(network: PreTrainedModel) -> bool:
    """Whether it is a classifier on a decoder: in transformers, only their heads are called ``score``."""
    return hasattr(network, "score")


def at_last_token(states: Tensor, mask: Tensor) -> Tensor:
    """The state of the last token of each text, on whichever side the padding is.

    ``states`` [batch, tokens, width] and ``mask`` [batch, tokens] to [batch, width].
    """
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
    places = last.to(states.device).reshape(-1, 1, 1).expand(-1, 1, states.shape[2])
    return states.gather(1, places).squeeze(1)  # indexing by rows would fix the batch size of an exported graph


def padded_left(tensor: Tensor, mask: Tensor) -> Tensor:
    """Move the padding of ``tensor`` [batch, tokens(, width)] from the right, as in ``mask``, to the left."""
    return _rotated(tensor, mask.sum(dim=1, keepdim=True))


def padded_right(tensor: Tensor, mask: Tensor) -> Tensor:
    """Move the padding of ``tensor`` from the left to the right; ``mask`` is that of the result."""
    return _rotated(tensor, -mask.sum(dim=1, keepdim=True))


def _rotated(tensor: Tensor, by: Tensor) -> Tensor:
    places = (torch.arange(tensor.shape[1], device=tensor.device) + by.to(tensor.device)) % tensor.shape[1]
    if tensor.dim() == 3:
        places = places.unsqueeze(2).expand(-1, -1, tensor.shape[2])
    return tensor.gather(1, places)
