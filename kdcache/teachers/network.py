"""How a model of transformers is run on padded texts, so that a text gives the same alone and in a batch.

Everywhere in kdcache padding is on the right, whatever the tokenizer says: states of tokens lie where their tokens do. That is
right for encoders (positions count from the first token) and for causal decoders (no token sees what follows it). Three kinds
of model want more, and get it here and nowhere else:

- heads that read the last position (XLNet): the inputs are turned to the left side and the hidden states turned back;
- heads that look for the last token that is not padding (GPT-2, Llama, Qwen): padding gets the id that they know as padding;
- the same heads where the config names no such id: transformers then reads the last position and takes one text at a time;
  the last token of each text is read here, by the attention mask.
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
    """``logits`` [batch, classes] of a classifier, else None; ``last`` [batch, tokens, width] is the last hidden state, None of a
    classifier that was not asked for hidden states; ``hidden_states`` is empty where they were not asked for.
    """

    logits: Tensor | None
    last: Tensor | None
    hidden_states: tuple[Tensor, ...]


def accepted_inputs(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that the model's forward takes.

    Token types are left out where the model knows one type only (RoBERTa): the second type of a pair would be out of range.
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
        options["use_cache"] = False  # keys and values for tokens that nobody generates
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


def reads_last_position(network: PreTrainedModel) -> bool:
    """Whether it is a classifier whose head reads the last position of the batch, be it a token or padding (XLNet)."""
    return hasattr(network, "sequence_summary") and getattr(network.config, "summary_type", None) == "last"


def head_reads_the_end(network: PreTrainedModel) -> bool:
    """Whether it is a classifier whose head reads the last token of a text, rather than the first or all of them."""
    return reads_last_position(network) or _reads_last_token(network)


def _reads_last_token(network: PreTrainedModel) -> bool:
    """Classifiers on top of decoders: in transformers their heads, and no others, are called ``score``."""
    return hasattr(network, "score")


def at_last_token(states: Tensor, mask: Tensor) -> Tensor:
    """[batch, width]: of ``states`` [batch, tokens, width] that of the last token of each text, on whichever side the padding is."""
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
    places = last.to(states.device).reshape(-1, 1, 1).expand(-1, 1, states.shape[2])
    return states.gather(1, places).squeeze(1)  # indexing by rows would fix their number in an exported graph


def padded_left(tensor: Tensor, mask: Tensor) -> Tensor:
    """``tensor`` [batch, tokens] or [batch, tokens, width], padded on the right, with the padding moved to the left; ``mask`` is that on the right."""
    return _turned(tensor, mask.sum(dim=1, keepdim=True))


def padded_right(tensor: Tensor, mask: Tensor) -> Tensor:
    """``tensor``, padded on the left, with the padding moved to the right; ``mask`` is that on the right."""
    return _turned(tensor, -mask.sum(dim=1, keepdim=True))


def _turned(tensor: Tensor, by: Tensor) -> Tensor:
    places = (torch.arange(tensor.shape[1], device=tensor.device) + by.to(tensor.device)) % tensor.shape[1]
    if tensor.dim() == 3:
        places = places.unsqueeze(2).expand(-1, -1, tensor.shape[2])
    return tensor.gather(1, places)
