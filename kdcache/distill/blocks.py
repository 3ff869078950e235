"""Cutting an encoder down to some of its blocks, whatever its family.

Encoders differ in where they keep their blocks, not in how: a ``ModuleList`` that is run in order. Where that is not so
(ALBERT runs one block many times), cutting would give a model that does not load again, so it is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from kdcache.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_PLACES = (
    "encoder.layer",  # BERT, RoBERTa, XLM-R, MPNet, ELECTRA, DeBERTa, CamemBERT …
    "transformer.layer",  # DistilBERT
    "encoder.layers",
    "layers",  # ModernBERT
)
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "seq_classif_dropout",
    "classifier_dropout", "cls_dropout", "pooler_dropout", "embedding_dropout", "mlp_dropout", "activation_dropout",
)  # fmt: skip


def blocks_to_keep(layers: int | Sequence[int] | None, depth: int, source: str) -> tuple[int, ...]:
    """The blocks (1-based) that a student of a source with ``depth`` blocks keeps: the first K, those listed, or all.

    Raises ModelError where there are fewer, or where the list repeats or disorders them.
    """
    chosen = (
        tuple(range(1, depth + 1))
        if layers is None
        else tuple(range(1, layers + 1))
        if isinstance(layers, int)
        else tuple(layers)
    )
    if isinstance(layers, int) and layers > depth:
        raise ModelError(
            f"student.layers asks for {layers} layers, but '{source}' has {depth}", f"Set student.layers to at most {depth}."
        )
    for layer in chosen:
        if not 1 <= layer <= depth:
            raise ModelError(
                f"student.layers names layer {layer}, but '{source}' has layers 1 to {depth}", f"Choose from 1 to {depth}."
            )
    if not chosen or any(later <= earlier for earlier, later in itertools.pairwise(chosen)):
        raise ModelError(
            f"student.layers is {list(chosen)}; expected at least one layer, in rising order, none twice",
            "Example: layers = [1, 3, 5]",
        )
    return chosen


def keep_blocks(encoder: PreTrainedModel, chosen: Sequence[int], source: str) -> None:
    """Drop all other blocks, in place, and say so in the config; ModelError for families whose blocks cannot be cut."""
    depth = encoder.config.num_hidden_layers
    if tuple(chosen) == tuple(range(1, depth + 1)):
        return
    parent, name = _block_list(encoder, depth, source)
    blocks = cast("nn.ModuleList", getattr(parent, name))
    setattr(parent, name, nn.ModuleList(blocks[layer - 1] for layer in chosen))
    for key in ("layer_types", "block_types"):
        per_layer = getattr(encoder.config, key, None)
        if isinstance(per_layer, list) and len(per_layer) == depth:
            setattr(encoder.config, key, [per_layer[layer - 1] for layer in chosen])
    encoder.config.num_hidden_layers = len(chosen)
    _must_load_again(encoder, source)


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
        f"layers of '{source}' cannot be chosen: models of type '{encoder.config.model_type}' keep their {depth} layers "
        f"in none of the places kdcache knows ({', '.join(_PLACES)}), or share weights between them",
        "Leave out student.layers, or take a student of another family, e.g. BERT, RoBERTa, DistilBERT, MPNet, ELECTRA or DeBERTa.",
    )


def _must_load_again(encoder: PreTrainedModel, source: str) -> None:
    with torch.device("meta"):
        rebuilt = type(encoder)(encoder.config)
    ours, theirs = encoder.state_dict(), rebuilt.state_dict()
    names = (name for name in ours.keys() | theirs.keys() if not name.startswith("pooler."))  # classifiers may do without
    differing = sorted(name for name in names if _shape(ours, name) != _shape(theirs, name))
    if differing:
        raise ModelError(
            f"'{source}' cut to {encoder.config.num_hidden_layers} layers would not load again: its config makes "
            f"'{differing[0]}' {_shape(theirs, differing[0])}, the cut model has {_shape(ours, differing[0])}",
            "Leave out student.layers for this family.",
        )


def _shape(state: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def set_dropout(config: PretrainedConfig, dropout: float | None) -> None:
    """Every dropout probability that the config knows becomes ``dropout``; None leaves them."""
    for name in _DROPOUTS if dropout is not None else ():
        if hasattr(config, name):
            setattr(config, name, dropout)
