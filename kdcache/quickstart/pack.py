"""Decode a ``HMSEMB01`` pack into a Hugging Face RoBERTa folder in float32.

The file: magic ``HMSEMB01``; header length as little-endian u64; header in JSON; tokenizer.json; then the tensors back
to back in the header's order. A float32 tensor is its values. An int8 tensor is all codes first, then one float32 scale
per ``group`` consecutive codes: value = code * scale. Query, key and value weights are stacked in one tensor.
Everything in the header is checked against the file's size before it is used.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import DamageError

MAGIC = b"HMSEMB01"
_EMBEDDINGS = {
    "word_emb": "word_embeddings.weight",
    "pos_emb": "position_embeddings.weight",
    "type_emb": "token_type_embeddings.weight",
    "emb_ln.w": "LayerNorm.weight",
    "emb_ln.b": "LayerNorm.bias",
}
_BLOCK = {
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "f1": "intermediate.dense",
    "f2": "output.dense",
    "fln": "output.LayerNorm",
}


def unpack_model(pack: bytes, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer to ``folder``; DamageError where the pack is malformed."""
    from safetensors.numpy import save_file

    header, tokenizer, tensors = read_pack(pack)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_roberta(tensors, header["arch"]), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_bytes(tokenizer)
    _write_json(folder / "config.json", roberta_config(header["arch"]))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(header["arch"]))


def read_pack(pack: bytes) -> tuple[dict[str, Any], bytes, dict[str, np.ndarray]]:
    """(header, tokenizer.json, tensors in float32 by the pack's own names)."""
    if pack[:8] != MAGIC or len(pack) < 16:
        raise DamageError(f"the model pack starts with {pack[:8]!r}; expected {MAGIC!r}")
    start = 16 + struct.unpack("<Q", pack[8:16])[0]
    if start > len(pack):
        raise DamageError(f"the model pack's header ends at byte {start}, the file at {len(pack)}")
    header = json.loads(pack[16:start])
    position = start + int(header["tokenizer_len"])
    tokenizer, tensors = pack[start:position], {}
    for entry in header["tensors"]:
        tensors[entry["name"]] = _tensor(entry, pack[position : position + int(entry["len"])])
        position += int(entry["len"])
    if position != len(pack):
        raise DamageError(f"the model pack's tensors end at byte {position}, the file at {len(pack)}")
    return header, tokenizer, tensors


def _tensor(entry: dict[str, Any], raw: bytes) -> np.ndarray:
    count = math.prod(entry["shape"])
    group = int(entry["group"]) if entry["dtype"] == "i8" else 0
    expected = count + 4 * (count // group) if group else 4 * count
    if len(raw) != expected or entry["dtype"] not in ("f32", "i8") or (group and count % group):
        raise DamageError(
            f"tensor '{entry['name']}' of the model pack has {len(raw)} bytes; its shape asks for {expected}"
        )
    if not group:
        return np.frombuffer(raw, "<f4").reshape(entry["shape"]).copy()
    codes, scales = np.frombuffer(raw[:count], "i1"), np.frombuffer(raw[count:], "<f4")
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise DamageError(f"tensor '{entry['name']}' of the model pack has scales that are not finite and positive")
    values: np.ndarray = codes.reshape(-1, group).astype(np.float32) * scales[:, None]
    return values.reshape(entry["shape"])


def to_roberta(tensors: dict[str, np.ndarray], arch: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors under the names that transformers' RobertaModel gives them."""
    width = int(arch["hidden"])
    named = {f"embeddings.{theirs}": tensors[ours] for ours, theirs in _EMBEDDINGS.items()}
    for layer in range(int(arch["layers"])):
        block = f"encoder.layer.{layer}"
        for kind, full in (("w", "weight"), ("b", "bias")):
            stacked = tensors[f"l{layer}.qkv.{kind}"]
            for position, part in enumerate(("query", "key", "value")):
                rows = stacked[position * width : (position + 1) * width]
                named[f"{block}.attention.self.{part}.{full}"] = np.ascontiguousarray(rows)
            for ours, theirs in _BLOCK.items():
                named[f"{block}.{theirs}.{full}"] = tensors[f"l{layer}.{ours}.{kind}"]
    return named


def roberta_config(arch: dict[str, Any]) -> dict[str, Any]:
    """config.json for ``AutoModel``."""
    return {
        "architectures": ["RobertaModel"],
        "model_type": "roberta",
        "vocab_size": arch["vocab"],
        "hidden_size": arch["hidden"],
        "num_hidden_layers": arch["layers"],
        "num_attention_heads": arch["heads"],
        "intermediate_size": arch["intermediate"],
        "max_position_embeddings": arch["max_positions"],
        "type_vocab_size": arch["type_vocab"],
        "layer_norm_eps": arch["layer_norm_eps"],
        "hidden_act": "gelu",
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def tokenizer_config(arch: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: RoBERTa's special tokens."""
    return {
        "tokenizer_class": "RobertaTokenizerFast",
        "model_max_length": arch["max_positions"] - 2,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
        "add_prefix_space": False,
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
