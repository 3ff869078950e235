"""Where padding may stand in a model's input, and which token it is.

A causal decoder reads its answer at the last token, which transformers finds by the padding token of the config; XLNet reads it
at the last position, so that its padding must be on the left; every other encoder reads it at the first one, or over all.
Batches come from the loader with the padding on the right, whatever the model: ``to_the_left`` turns them.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def is_causal(network: nn.Module) -> bool:
    """Whether a token sees only those before it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    config = getattr(network, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    if any(getattr(module, "is_causal", False) is True for module in network.modules()):
        return True
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    return known and takes(network, "use_cache")  # BLOOM and its like, which do not mark their attention


def takes(network: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return name in inspect.signature(network.forward).parameters


def reads_last_position(network: nn.Module) -> bool:
    """Whether the classifier takes the last position for the text's summary, padding or not (XLNet)."""
    summary = getattr(network, "sequence_summary", None)
    return summary is not None and getattr(summary, "summary_type", None) == "last"


def settle_padding(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give ``tokenizer`` the side that the model needs, and a causal model's config the tokenizer's padding token."""
    tokenizer.padding_side = "left" if reads_last_position(network) else "right"
    if not is_causal(network) or network.config.pad_token_id == tokenizer.pad_token_id:
        return
    network.config.pad_token_id = tokenizer.pad_token_id
    embeddings = network.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding) and embeddings.padding_idx is not None:
        embeddings.padding_idx = tokenizer.pad_token_id  # as it will be in the model that is loaded from that config


def require_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token_id: int | None) -> int:
    """The tokenizer's padding token; where it has none it becomes the config's, else the one that ends a text. Raises ModelError."""
    if tokenizer.pad_token_id is None:
        words = tokenizer.convert_ids_to_tokens([pad_token_id]) if _is_id(pad_token_id, tokenizer) else [None]
        token = words[0] if words[0] is not None else tokenizer.eos_token
        if token is None:
            raise ModelError(
                f"the tokenizer '{tokenizer.name_or_path}' has no padding token, and none that ends a text to take its place",
                "Set student.tokenizer to one that has, or pad_token in its tokenizer_config.json.",
            )
        tokenizer.pad_token = token
    return int(tokenizer.pad_token_id)


def _is_id(value: int | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    return isinstance(value, int) and 0 <= value < len(tokenizer)


def positions(attention_mask: Tensor) -> Tensor:
    """int64 [batch, tokens]: the place of each token in its own text, padding left out of the count."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)


def left_places(attention_mask: Tensor) -> Tensor:
    """int64 [batch, tokens]: for each position with the padding on the left, where its token stands now.

    The padding may stand on either side; a row's tokens stand together.
    """
    length = attention_mask.shape[1]
    valid = attention_mask.long()
    first, count = valid.argmax(dim=1, keepdim=True), valid.sum(dim=1, keepdim=True)
    return (torch.arange(length, device=attention_mask.device)[None, :] + first + count) % length


def taken(values: Tensor, places: Tensor) -> Tensor:
    """``values`` [batch, tokens, …] at ``places`` [batch, tokens]."""
    return values[torch.arange(len(values), device=values.device)[:, None], places]
