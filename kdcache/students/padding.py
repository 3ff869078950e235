"""Which token pads a student's texts, and on which side: what is saved with it, so that transformers alone reads it the
same way.

kdcache itself pads on the right and turns the batch where a model wants that (``kdcache.teachers.network``). Whoever
loads the student without kdcache has only the tokenizer's side and the padding token of tokenizer and config: decoders
find the last token of a text by the latter, and XLNet reads the last position.
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
    """Whether a token sees only those before it; nothing is run, so that it may be asked of a model without weights."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if any(getattr(module, "is_causal", False) is True for module in network.modules()):
        return True
    kind = type(getattr(network, "config", None))  # BLOOM and its like do not mark their attention
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    return known and "use_cache" in inspect.signature(network.forward).parameters


def require_pad_token(tokenizer: PreTrainedTokenizerBase, config_id: int | None) -> int:
    """Id of the tokenizer's padding token; where it has none, the token that is chosen becomes it.

    That is the one of the config, ``config_id``; else the one that ends a text; and where the tokenizer itself ends
    every text with that one, a decoder would look for the last token before it: then an unknown or a first token.
    Raises ModelError where there is none.
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
    """Give ``tokenizer`` the side that the model needs, and a causal model's config the tokenizer's padding token."""
    tokenizer.padding_side = "left" if reads_last_position(network) else "right"
    if not declares_causal_attention(network) or network.config.pad_token_id == tokenizer.pad_token_id:
        return
    network.config.pad_token_id = tokenizer.pad_token_id
    embeddings = network.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding) and embeddings.padding_idx is not None:
        embeddings.padding_idx = tokenizer.pad_token_id  # as in the model that will be loaded from that config
