"""Which teacher layers are stored, and how: the settings of a recipe turned into numbers.

A layer number is an index into the encoder's hidden states: 0 is the embeddings, k the output of block k, the depth the
last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kdcache.codecs.base import LayerSpec
from kdcache.codecs.registry import format_of
from kdcache.errors import ModelError, RecipeError
from kdcache.methods.parts.layer_map import even_layers
from kdcache.recipe.sections import check_stored

if TYPE_CHECKING:
    from kdcache.recipe import Recipe, TeacherSection


def resolve_layers(setting: str | Sequence[int], depth: int, student_layers: int | None, name: str) -> tuple[int, ...]:
    """The distinct layers of teacher ``name`` that ``setting`` asks for, in rising order.

    ``setting`` is 'even' (what ``even_layers`` gives), 'all' (every block), 'last', 'none' (soft labels only), or a
    list. Raises ModelError where the teacher has no such layer, RecipeError for 'even' without a student to be even
    with.
    """
    if setting == "even":
        if student_layers is None:
            raise RecipeError(
                'dump.layers is "even", and the recipe has no student whose depth would say which layers these are',
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
    """``layer`` itself; ModelError where the teacher has no such layer."""
    if not 0 <= layer <= depth:
        raise ModelError(
            f"teacher '{name}' has no layer {layer}: its layers are 0 (embeddings) to {depth} (the last block)",
            f"Choose layers from 0 to {depth} in dump.layers, or in the layers of [[teachers]] '{name}'.",
        )
    return layer


def layer_spec(recipe: Recipe, section: TeacherSection, layer: int, depth: int, width: int) -> LayerSpec:
    """How a layer of a teacher is stored.

    ModelError where it cannot be, RecipeError where settings of tables do not fit together.
    """
    form = recipe.stored(section, ("all", *(["last"] if layer == depth else []), str(layer)))
    try:
        check_stored(form)
    except ValueError as error:
        raise RecipeError(
            f"layer {layer} of teacher '{section.name}': {error}", "See dump.per_layer and its per_layer."
        ) from error
    assert form.projection is not None and form.dim is not None and form.dtype is not None and form.tokens is not None
    asked = LayerSpec(form.projection, form.dim, form.dtype, form.bytes or 0, form.tokens)
    return spec_like(asked, section.name, layer, width)


def spec_like(form: LayerSpec, name: str, layer: int, width: int) -> LayerSpec:
    """A layer of another teacher, or another layer, stored as ``form`` is.

    ModelError where it does not fit the width.
    """
    return format_of(form).layer(form, width, f"layer {layer} of teacher '{name}'")


def check_names(names: Iterable[str], layers: Sequence[int], where: str, name: str) -> None:
    """RecipeError where ``names`` of a per_layer table has the number of a layer that is not stored of teacher
    ``name``.
    """
    for one in names:
        if one.isdecimal() and int(one) not in layers:
            stored = ", ".join(str(layer) for layer in layers) or "none"
            raise RecipeError(
                f"{where} speaks of layer {one}, which is not stored of teacher '{name}'; stored are: {stored}",
                "Name one of these there, or add the layer to the layers that are stored.",
            )
