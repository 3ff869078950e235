"""Cutting a model of any family down to some of its blocks.

Nearly all families keep their blocks in a ``ModuleList`` that runs in order, under different names. Others (ALBERT runs
one block many times) are refused, since the cut model would not load again. Lists of the config with one entry per
block (sliding or full attention) are cut too. The result is compared with a model that is built from the saved config.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from kdcache.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_PLACES = (
    "encoder.layer",  # BERT, RoBERTa, XLM-R, MPNet, ELECTRA, DeBERTa, CamemBERT …
    "transformer.layer",  # DistilBERT
    "encoder.layers",
    "layers",  # ModernBERT, Llama, Qwen, Mistral, Gemma, GPT-NeoX
    "layer",  # XLNet
    "h",  # GPT-2, GPT-J, GPT-Neo, BLOOM, Falcon
    "decoder.layers",  # OPT
)
_PER_LAYER = (  # config lists with one entry per block
    "layer_types", "block_types", "layers_block_type", "mlp_layer_types", "attention_layers", "attention_window",
    "no_rope_layers",
)  # fmt: skip
_INDEX = {"layer_idx", "layer_id", "layer_number"}  # a block's own index, for the KV cache of a decoder
_IGNORED = {"training", "name_or_path"}
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "seq_classif_dropout",
    "classifier_dropout", "cls_dropout", "pooler_dropout", "embedding_dropout", "mlp_dropout", "activation_dropout",
    "classifier_dropout_prob", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout",
    "summary_last_dropout",
)  # fmt: skip


def blocks_to_keep(layers: int | Sequence[int] | None, depth: int, source: str) -> tuple[int, ...]:
    """The blocks (1-based) that a student of a source with ``depth`` blocks keeps: the first K, those listed, or all.

    Raises ModelError for blocks that the source lacks, and for a list that is not ascending.
    """
    last = depth if layers is None else layers
    chosen = tuple(range(1, last + 1)) if isinstance(last, int) else tuple(last)
    if isinstance(layers, int) and layers > depth:
        raise ModelError(
            f"student.layers asks for {layers} layers, but '{source}' has {depth}",
            f"Set student.layers to at most {depth}.",
        )
    for layer in chosen:
        if not 1 <= layer <= depth:
            raise ModelError(
                f"student.layers names layer {layer}, but '{source}' has layers 1 to {depth}",
                f"Choose from 1 to {depth}.",
            )
    if not chosen or any(later <= earlier for earlier, later in itertools.pairwise(chosen)):
        raise ModelError(
            f"student.layers is {list(chosen)}; expected at least one layer, in rising order, none twice",
            "Example: layers = [1, 3, 5]",
        )
    return chosen


def keep_blocks(encoder: PreTrainedModel, chosen: Sequence[int], source: str) -> None:
    """Remove all other blocks in place and adapt the config; ModelError for families whose blocks cannot be cut."""
    depth = encoder.config.num_hidden_layers
    if tuple(chosen) == tuple(range(1, depth + 1)):
        return
    parent, name = _block_list(encoder, depth, source)
    blocks = cast("nn.ModuleList", getattr(parent, name))
    setattr(parent, name, nn.ModuleList(blocks[layer - 1] for layer in chosen))
    for key in _PER_LAYER:
        per_layer = getattr(encoder.config, key, None)
        if isinstance(per_layer, list | tuple) and len(per_layer) == depth:
            setattr(encoder.config, key, [per_layer[layer - 1] for layer in chosen])
    encoder.config.num_hidden_layers = len(chosen)
    rebuilt = _as_it_will_load(encoder, source)
    _renumber(encoder, rebuilt, depth)
    _must_load_again(encoder, rebuilt, source)


def _block_list(encoder: PreTrainedModel, depth: int, source: str) -> tuple[nn.Module, str]:
    for place in _PLACES:
        *path, name = place.split(".")
        parent: nn.Module | None = encoder
        for step in path:
            parent = getattr(parent, step, None)
        blocks = getattr(parent, name, None) if parent is not None else None
        if isinstance(blocks, nn.ModuleList) and len(blocks) == depth:
            return cast("nn.Module", parent), name
    raise ModelError(
        f"layers of '{source}' cannot be chosen: models of type '{encoder.config.model_type}' keep their {depth} "
        f"layers in none of the places kdcache knows ({', '.join(_PLACES)}), or share weights between them",
        "Leave out student.layers, or take a student of another family, e.g. BERT, RoBERTa, DistilBERT, MPNet, ELECTRA "
        "or DeBERTa.",
    )


def _as_it_will_load(encoder: PreTrainedModel, source: str) -> PreTrainedModel:
    """The model, without weights, that transformers builds from the saved config."""
    try:
        config = type(encoder.config).from_dict(json.loads(encoder.config.to_json_string()))
        with torch.device("meta"):
            return type(encoder)(config)
    except Exception as error:  # configs check their own values, each in its way
        reason = first_line(error)
        raise _not_to_be_cut(encoder, source, f"its config does not take them: {reason}") from error


def _renumber(encoder: PreTrainedModel, rebuilt: PreTrainedModel, depth: int) -> None:
    """Set the indices of blocks, and their number, to the values that they have after loading."""
    theirs = dict(rebuilt.named_modules())
    for path, module in encoder.named_modules():
        for name, value in _plain_values(module).items():
            wanted = getattr(theirs.get(path), name, value)
            is_depth = value == depth and wanted == encoder.config.num_hidden_layers and type(value) is int
            if name in _INDEX or is_depth:
                setattr(module, name, wanted)


def _must_load_again(encoder: PreTrainedModel, rebuilt: PreTrainedModel, source: str) -> None:
    ours, theirs = encoder.state_dict(), rebuilt.state_dict()
    names = (
        name for name in ours.keys() | theirs.keys() if not name.startswith("pooler.")
    )  # classifiers may do without
    differing = sorted(name for name in names if _shape(ours, name) != _shape(theirs, name))
    if differing:
        name = differing[0]
        raise _not_to_be_cut(
            encoder, source, f"its config makes '{name}' {_shape(theirs, name)}, the cut model has {_shape(ours, name)}"
        )
    modules = dict(rebuilt.named_modules())
    for path, module in encoder.named_modules():
        other = _plain_values(modules[path]) if path in modules else {}
        for name, value in _plain_values(module).items():
            if name in other and other[name] != value:
                raise _not_to_be_cut(
                    encoder, source, f"its config makes {name} of '{path}' {other[name]!r}, the cut model has {value!r}"
                )


def _not_to_be_cut(encoder: PreTrainedModel, source: str, reason: str) -> ModelError:
    return ModelError(
        f"'{source}' cut to {encoder.config.num_hidden_layers} layers would not load again: {reason}",
        "Leave out student.layers for this family, or keep its first layers.",
    )


def _plain_values(module: nn.Module) -> dict[str, Any]:
    """The numbers, strings and flags of a module; together with its tensors they decide what it computes."""
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _IGNORED and not name.startswith("_") and isinstance(value, bool | int | float | str | None)
    }


def _shape(state: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def set_dropout(config: PretrainedConfig, dropout: float | None) -> None:
    """Set every dropout probability of the config; None leaves them."""
    for name in _DROPOUTS if dropout is not None else ():
        if hasattr(config, name):
            setattr(config, name, dropout)
