"""Which teacher layers are stored, and how: a recipe's settings as layer numbers and LayerSpecs.

A layer number is an index into the encoder's hidden states: 0 is the embeddings, k is the output of block k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kdcache.codecs.base import LayerSpec
from kdcache.codecs.registry import format_of
from kdcache.errors import ModelError, RecipeError
from kdcache.methods.parts.layer_map import even_layers
from kdcache.recipe.storage import check_stored

if TYPE_CHECKING:
    from kdcache.recipe import Recipe, TeacherSection


def resolve_layers(setting: str | Sequence[int], depth: int, student_layers: int | None, name: str) -> tuple[int, ...]:
    """The distinct layers of teacher ``name`` that ``setting`` names, in ascending order.

    ``setting`` is 'even' (see ``even_layers``), 'all' (every block), 'last', 'none' (soft labels only), or a list.
    Raises ModelError if the teacher has no such layer, RecipeError for 'even' without a student.
    """
    if setting == "even":
        if student_layers is None:
            raise RecipeError(
                'dump.layers is "even", which needs the depth of a student, and the recipe has no student',
                "Add a [student] section, or list the layers: dump.layers = [4, 8, 12].",
            )
        return tuple(sorted(set(even_layers(depth, student_layers))))
    if setting == "all":
        return tuple(range(1, depth + 1))
    if setting == "last":
        return (depth,)
    if setting == "none":
        return ()
    if isinstance(setting, str):
        raise RecipeError(f"dump.layers is '{setting}'; expected even, all, last, none or a list of layer numbers")
    return tuple(sorted({check_layer(layer, depth, name) for layer in setting}))


def check_layer(layer: int, depth: int, name: str) -> int:
    """``layer``; ModelError if the teacher has no such layer."""
    if not 0 <= layer <= depth:
        raise ModelError(
            f"teacher '{name}' has no layer {layer}: its layers are 0 (embeddings) to {depth} (the last block)",
            f"Choose layers from 0 to {depth} in dump.layers, or in the layers of [[teachers]] '{name}'.",
        )
    return layer


def layer_spec(recipe: Recipe, section: TeacherSection, layer: int, depth: int, width: int) -> LayerSpec:
    """The recipe's storage format of a layer. ModelError if it does not fit, RecipeError if settings contradict."""
    stored = recipe.stored(section, ("all", *(["last"] if layer == depth else []), str(layer)))
    try:
        check_stored(stored)
    except ValueError as error:
        raise RecipeError(
            f"layer {layer} of teacher '{section.name}': {error}", "See dump.per_layer and its per_layer."
        ) from error
    assert stored.projection is not None and stored.dim is not None
    assert stored.dtype is not None and stored.tokens is not None
    asked = LayerSpec(stored.projection, stored.dim, stored.dtype, stored.bytes or 0, stored.tokens)
    return spec_like(asked, section.name, layer, width)


def spec_like(like: LayerSpec, name: str, layer: int, width: int) -> LayerSpec:
    """``like`` for a layer of teacher ``name``; ModelError if it does not fit the width."""
    return format_of(like).layer(like, width, f"layer {layer} of teacher '{name}'")


def check_names(names: Iterable[str], layers: Sequence[int], where: str, name: str) -> None:
    """RecipeError if a key of a per_layer table is the number of a layer of teacher ``name`` that is not stored."""
    for key in names:
        if key.isdecimal() and int(key) not in layers:
            stored = ", ".join(str(layer) for layer in layers) or "none"
            raise RecipeError(
                f"{where} names layer {key}, which is not stored of teacher '{name}'; stored are: {stored}",
                "Name one of these there, or add the layer to dump.layers.",
            )
