"""Which teacher layers are stored: the setting of a recipe turned into numbers.

A layer number is an index into the encoder's hidden states: 0 is the embeddings, k the output of block k, the depth the last.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdcache.errors import ModelError, RecipeError
from kdcache.teachers.layer_map import even_layers


def resolve_layers(setting: str | Sequence[int], depth: int, student_layers: int | None, name: str) -> tuple[int, ...]:
    """The distinct layers of teacher ``name`` that ``setting`` asks for, in rising order.

    ``setting`` is 'even' (what ``even_layers`` gives), 'all' (every block), 'last', 'none' (soft labels only), or a list.
    Raises ModelError where the teacher has no such layer, RecipeError for 'even' without a student to be even with.
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
