"""The padding token and padding side that are saved with a student, so that transformers alone reads texts correctly.

kdcache pads on the right and moves the padding for models that need it on the left (``kdcache.teachers.network``).
Without kdcache, only the tokenizer's side and the padding token of tokenizer and config count: decoders find the last
token of a text by the padding token, and XLNet reads the last position.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import nn

from kdcache.errors import ModelError
from kdcache.teachers.network import reads_last_position

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def declares_causal_attention(network: nn.Module) -> bool:
    """Whether a token attends only to those before it. Works for a model without weights: nothing is run."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if any(getattr(module, "is_causal", False) is True for module in network.modules()):
        return True
    kind = type(getattr(network, "config", None))  # families such as BLOOM do not set is_causal
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    return known and "use_cache" in inspect.signature(network.forward).parameters


def require_pad_token(tokenizer: PreTrainedTokenizerBase, config_id: int | None) -> int:
    """Id of the tokenizer's padding token; a tokenizer without one is given one.

    The choice is the token of the config (``config_id``), else the end-of-text token. Where the tokenizer ends every
    text with that token, a decoder would mistake it for padding, so the unknown or first token is taken instead. Raises
    ModelError where there is no candidate.
    """
    if tokenizer.pad_token_id is None:
        if config_id is not None and 0 <= config_id < len(tokenizer):
            token: str | None = tokenizer.convert_ids_to_tokens([config_id])[0]
        else:
            token = _stand_in(tokenizer)
        if not token:
            raise ModelError(
                f"the tokenizer '{tokenizer.name_or_path}' has no padding token, and none that ends a text to take its "
                "place",
                "Set student.tokenizer to one that has, or pad_token in its tokenizer_config.json.",
            )
        tokenizer.pad_token = token
    return int(tokenizer.pad_token_id)


def _stand_in(tokenizer: PreTrainedTokenizerBase) -> str | None:
    end: str | None = tokenizer.eos_token
    ids = tokenizer("a")["input_ids"]
    if end is None or not ids or ids[-1] != tokenizer.eos_token_id:
        return end
    return next((token for token in (tokenizer.unk_token, tokenizer.bos_token) if token and token != end), end)


def settle_padding(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the tokenizer's padding side to what the model needs, and a causal model's padding id to the tokenizer's."""
    tokenizer.padding_side = "left" if reads_last_position(network) else "right"
    if not declares_causal_attention(network) or network.config.pad_token_id == tokenizer.pad_token_id:
        return
    network.config.pad_token_id = tokenizer.pad_token_id
    embeddings = network.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding) and embeddings.padding_idx is not None:
        embeddings.padding_idx = tokenizer.pad_token_id  # as in a model loaded from that config
