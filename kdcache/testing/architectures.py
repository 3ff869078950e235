"""Tiny random models of many architectures, made on the spot: the cases that kdcache meets when users name models.

Each entry of ``ARCHITECTURES`` has the settings that are special in its family: the special tokens, the padding side,
token types, a missing pad token, positions that are counted from the padding token, hidden states of changing length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdcache.testing.tiny import bytelevel_tokenizer, sentencepiece_tokenizer, wordpiece_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Kind = Literal["encoder", "decoder", "encoder-decoder"]
Saved = Literal["base", "classifier"]

WIDTH, DEPTH, POSITIONS = 32, 3, 96
_SIZES: Mapping[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
_DEBERTA: Mapping[str, Any] = {
    **_SIZES, "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": -1,
    "position_biased_input": False,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One tiny model.

    ``settings`` are those of its config, ``token_ids`` the special tokens whose ids the config holds.
    """

    name: str
    model_type: str
    kind: Kind
    settings: Mapping[str, Any]
    make_tokenizer: Callable[[], Any] = field(repr=False)
    token_ids: Sequence[str] = ("pad", "bos", "eos")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A fast tokenizer with the special tokens and the padding side of the family."""
        made: PreTrainedTokenizerBase = self.make_tokenizer()
        return made

    def config(self, tokenizer: PreTrainedTokenizerBase, *, classes: int = 2, **changes: Any) -> PretrainedConfig:
        """The config for that tokenizer; ``changes`` override the settings of the table."""
        from transformers import AutoConfig

        ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in self.token_ids}
        names = {number: str(number) for number in range(classes)}
        labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        values = {"vocab_size": len(tokenizer), **ids, **self.settings, **labels, **changes}
        return AutoConfig.for_model(self.model_type, **values)

    def save(self, directory: Path, saved: Saved = "base", *, classes: int = 2, seed: int = 0, **changes: Any) -> Path:
        """Save a random model, base or sequence classifier, and its tokenizer to ``directory``."""
        import torch
        from transformers import AutoModel, AutoModelForSequenceClassification

        tokenizer = self.tokenizer()
        config = self.config(tokenizer, classes=classes, **changes)
        auto: Any = AutoModel if saved == "base" else AutoModelForSequenceClassification
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto.from_config(config, dtype=torch.float32)
            for name, weight in model.named_parameters():
                if (
                    weight.dim() > 1 and "norm" not in name.lower()
                ):  # with the usual 0.02 the outputs of a tiny model hardly depend on the text
                    torch.nn.init.normal_(weight, std=0.15)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory


def _special(
    tokenizer: Any,
    single: str,
    pair: str,
    *,
    tokens: Mapping[str, str | None],
    types: bool = False,
    side: str = "right",
) -> Any:
    """``tokenizer`` with other special tokens: templates of the tokenizers library, ``tokens`` by role (pad, eos …)."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    named = {role: token for role, token in tokens.items() if token is not None}
    backend.add_special_tokens(list(dict.fromkeys(named.values())))
    used = {piece.split(":")[0] for piece in f"{single} {pair}".split()} - {"$A", "$B"}
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, backend.token_to_id(token)) for token in sorted(used)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{role}_token": token for role, token in named.items()},
        padding_side=side, model_max_length=64,
        model_input_names=["input_ids", *(["token_type_ids"] if types else []), "attention_mask"],
    )  # fmt: skip


_CLS_SEP = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
_BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def _pieces_with_cls() -> Any:
    return _special(sentencepiece_tokenizer(), *_CLS_SEP, tokens=_BERT_TOKENS, types=True)


def _bytes_with_cls() -> Any:
    return _special(bytelevel_tokenizer(), *_CLS_SEP, tokens=_BERT_TOKENS)


def _words_without_types() -> Any:
    return _special(wordpiece_tokenizer(), *_CLS_SEP, tokens=_BERT_TOKENS)


def _cls_last() -> Any:
    tokens = {
        "pad": "<pad>",
        "unk": "<unk>",
        "bos": "<s>",
        "eos": "</s>",
        "cls": "<cls>",
        "sep": "<sep>",
        "mask": "<mask>",
    }
    pair = "$A <sep> $B:1 <sep>:1 <cls>:2"
    return _special(sentencepiece_tokenizer(), "$A <sep> <cls>:2", pair, tokens=tokens, types=True, side="left")


def _cls_of_its_own_type() -> Any:
    return _special(
        wordpiece_tokenizer(), "[CLS]:2 $A [SEP]", "[CLS]:2 $A [SEP] $B:1 [SEP]:1", tokens=_BERT_TOKENS, types=True
    )


def _bytes_alone(pad: str | None, side: str = "right") -> Any:
    tokens = {"pad": pad, "bos": "<|endoftext|>", "eos": "<|endoftext|>"}
    return _special(bytelevel_tokenizer(), "$A", "$A $B:1", tokens=tokens, side=side)


def _bos_first() -> Any:
    tokens = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
    return _special(sentencepiece_tokenizer(), "<s> $A", "<s> $A <s>:1 $B:1", tokens=tokens)


def _eos_last() -> Any:
    return _special(
        sentencepiece_tokenizer(), "$A </s>", "$A </s> $B </s>", tokens={"pad": "<pad>", "unk": "<unk>", "eos": "</s>"}
    )


_LLAMA: Mapping[str, Any] = {**_SIZES, "num_key_value_heads": 1, "head_dim": 16}
_ENTRIES = (
    Architecture("BERT", "bert", "encoder", _SIZES, wordpiece_tokenizer),
    Architecture("RoBERTa", "roberta", "encoder", {**_SIZES, "type_vocab_size": 1}, bytelevel_tokenizer),
    Architecture(
        "DistilBERT",
        "distilbert",
        "encoder",
        {"dim": WIDTH, "n_layers": DEPTH, "n_heads": 2, "hidden_dim": 2 * WIDTH, "max_position_embeddings": POSITIONS},
        _words_without_types,
    ),
    Architecture("MPNet", "mpnet", "encoder", _SIZES, bytelevel_tokenizer),
    Architecture("DeBERTa-v2", "deberta-v2", "encoder", _DEBERTA, _pieces_with_cls),
    Architecture(
        "DeBERTa-v3",
        "deberta-v2",
        "encoder",
        {**_DEBERTA, "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
        _pieces_with_cls,
    ),
    Architecture("ELECTRA", "electra", "encoder", {**_SIZES, "embedding_size": 16}, wordpiece_tokenizer),
    Architecture("ALBERT", "albert", "encoder", {**_SIZES, "embedding_size": 16}, _pieces_with_cls),
    Architecture(
        "ModernBERT",
        "modernbert",
        "encoder",
        {**_SIZES, "local_attention": 8, "global_attn_every_n_layers": 2},
        _bytes_with_cls,
        token_ids=("pad", "bos", "eos", "cls", "sep"),
    ),
    Architecture(
        "Longformer",
        "longformer",
        "encoder",
        {**_SIZES, "type_vocab_size": 1, "attention_window": 8},
        bytelevel_tokenizer,
    ),
    Architecture("XLM-R", "xlm-roberta", "encoder", {**_SIZES, "type_vocab_size": 1}, sentencepiece_tokenizer),
    Architecture(
        "XLNet", "xlnet", "encoder", {"d_model": WIDTH, "n_layer": DEPTH, "n_head": 2, "d_inner": 2 * WIDTH}, _cls_last
    ),
    Architecture(
        "Funnel",
        "funnel",
        "encoder",
        {
            "architectures": ["FunnelModel"],
            "block_sizes": [1, 1, 1],
            "d_model": WIDTH,
            "n_head": 2,
            "d_head": 16,
            "d_inner": 2 * WIDTH,
            "num_decoder_layers": 1,
        },
        _cls_of_its_own_type,
    ),
    Architecture(
        "GPT-2",
        "gpt2",
        "decoder",
        {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 2, "n_positions": POSITIONS},
        lambda: _bytes_alone(None),
        token_ids=("bos", "eos"),
    ),
    Architecture("Llama", "llama", "decoder", _LLAMA, _bos_first, token_ids=("bos", "eos")),
    Architecture("Qwen2", "qwen2", "decoder", _LLAMA, lambda: _bytes_alone("<|endoftext|>"), token_ids=("bos", "eos")),
    Architecture(
        "Qwen3", "qwen3", "decoder", _LLAMA, lambda: _bytes_alone("<|endoftext|>", "left"), token_ids=("bos", "eos")
    ),
    Architecture(
        "T5",
        "t5",
        "encoder-decoder",
        {
            "d_model": WIDTH,
            "num_layers": DEPTH,
            "num_heads": 2,
            "d_kv": 16,
            "d_ff": 2 * WIDTH,
            "decoder_start_token_id": 0,
        },
        _eos_last,
        token_ids=("pad", "eos"),
    ),
    Architecture(
        "BART",
        "bart",
        "encoder-decoder",
        {
            "d_model": WIDTH,
            "encoder_layers": DEPTH,
            "decoder_layers": DEPTH,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 2 * WIDTH,
            "decoder_ffn_dim": 2 * WIDTH,
            "max_position_embeddings": POSITIONS,
            "decoder_start_token_id": 2,
        },
        bytelevel_tokenizer,
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {entry.name: entry for entry in _ENTRIES}
