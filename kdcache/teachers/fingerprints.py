"""The identity of a teacher: sha256 over its tensors and over the part of its config that changes outputs.

Tensors are hashed, not files: a teacher that another library version saves again with the same numbers stays the same.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcache.cache.spec import Fingerprints
from kdcache.data.encoding import require_fast, tokenizer_fingerprint
from kdcache.teachers.teacher import accepted_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdcache.teachers.teacher import TeacherModel

_VOLATILE = {
    "_name_or_path", "architectures", "dtype", "finetuning_task", "gradient_checkpointing", "id2label", "label2id",
    "max_length", "output_attentions", "output_hidden_states", "problem_type", "return_dict", "tokenizer_class",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def fingerprint_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        values = tensor.detach().cpu().contiguous()
        header = json.dumps([name, str(values.dtype).removeprefix("torch."), list(values.shape)])
        digest.update(len(header).to_bytes(4, "little") + header.encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_config(config: Mapping[str, Any]) -> str:
    """sha256 of the config as canonical JSON, without keys that do not change what the model computes."""
    return hashlib.sha256(
        json.dumps(lasting_config(config), sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def lasting_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config that change what the model computes."""
    return {key: value for key, value in config.items() if key not in _VOLATILE}


def fingerprint_teacher(model: TeacherModel, tokenizer: PreTrainedTokenizerBase) -> Fingerprints:
    """The fingerprints of a teacher.

    Weights are those of the encoder without pooler. Head is the shared head with the adapter, or the classifier's own
    head with its class order.
    """
    shared: dict[str, Tensor] | None = None
    if model.head is not None:
        shared = head_tensors(model.head.state_dict(), model.adapter.state_dict() if model.adapter else {})
    weights, head = fingerprint_state(
        model.encoder.state_dict(),
        model.encoder.base_model_prefix,
        shared,
        None if model.head is None else model.head.pooling_name,
        None if model.class_order is None else model.class_order.tolist(),
    )
    return Fingerprints(
        weights=weights,
        head=head,
        config=fingerprint_config(model.encoder.config.to_diff_dict() | fingerprint_code(model.encoder)),
        tokenizer=tokenizer_fingerprint(tokenizer),
    )


def head_tensors(head: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a shared head and of a teacher's adapter, by the names in the fingerprint."""
    named = {f"head.{name}": tensor for name, tensor in head.items()}
    return named | {f"adapter.{name}": tensor for name, tensor in adapter.items()}


def fingerprint_state(
    network: Mapping[str, Tensor],
    base_model_prefix: str,
    shared: Mapping[str, Tensor] | None,
    pooling: str | None,
    class_order: Sequence[int] | None,
) -> tuple[str, str]:
    """The fingerprints of weights and head, from the tensors alone.

    Args:
        network: the encoder's tensors, or with an own head the classifier's.
        base_model_prefix: of the names of a classifier's encoder.
        shared: ``head_tensors`` under a shared head; None for an own one.
        pooling: of the shared head.
        class_order: of an own head.
    """
    if shared is not None:
        kind: dict[str, Any] = {"kind": "shared", "pooling": pooling}
        encoder = [(name, tensor) for name, tensor in network.items() if not name.startswith("pooler.")]
        head = list(shared.items())
    else:
        prefix = f"{base_model_prefix}."
        kind = {"kind": "own", "class_order": None if class_order is None else list(class_order)}
        encoder = [(name, tensor) for name, tensor in network.items() if name.startswith(prefix)]
        head = [(name, tensor) for name, tensor in network.items() if not name.startswith(prefix)]
    described = json.dumps(kind, sort_keys=True) + fingerprint_tensors(head)
    return fingerprint_tensors(encoder), hashlib.sha256(described.encode()).hexdigest()


def gives_token_types(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model distinguishes token types and the tokenizer gives them (``model_input_names``)."""
    return _takes_token_types(network) and "token_type_ids" in tokenizer.model_input_names


def tokenizer_as_used(
    fingerprint: str, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, columns: int
) -> str:
    """``fingerprint`` of the tokenizer, or another one if it withholds token types that would change the outputs.

    They would if the model distinguishes types and a text of ``columns`` columns has another type than 0.
    """
    if gives_token_types(network, tokenizer) or not _takes_token_types(network):
        return fingerprint
    probe = require_fast(tokenizer).encode("a", "a" if columns == 2 else None)
    if not any(kind for kind, valid in zip(probe.type_ids, probe.attention_mask, strict=True) if valid):
        return fingerprint
    return hashlib.sha256(f"{fingerprint} without token types".encode()).hexdigest()


def _takes_token_types(network: PreTrainedModel) -> bool:
    return "token_type_ids" in accepted_inputs(network) and getattr(network.config, "type_vocab_size", 2) >= 2


def fingerprint_code(model: object) -> dict[str, str]:
    """sha256 of the Python files that come with a model; empty for models of transformers."""
    module = sys.modules[type(model).__module__]
    if not module.__name__.startswith("transformers_modules.") or module.__file__ is None:
        return {}
    from transformers.dynamic_module_utils import get_relative_import_files

    files = sorted(
        {Path(module.__file__), *map(Path, get_relative_import_files(module.__file__))}, key=lambda path: path.name
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return {"code": digest.hexdigest()}
