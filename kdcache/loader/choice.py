"""What of a cache is used: splits, teachers and their layers, each checked by name before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.cache.spec import needs_tokens
from kdcache.codecs.registry import format_of
from kdcache.errors import MismatchError, RecipeError
from kdcache.methods.parts.layer_map import LayerMap, even_layers, layers_read

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kdcache.cache.reader import Cache
    from kdcache.codecs.base import Basis, Decoder, TokenSelection


def splits_of(cache: Cache, split: str, with_transfer: bool) -> tuple[str, ...]:
    """``split``, and 'transfer' behind it where it is wanted and there."""
    extra = ("transfer",) if with_transfer and split != "transfer" and "transfer" in cache.splits else ()
    return (split, *extra)


def chosen_teachers(
    cache: Cache,
    teachers: Sequence[str] | None,
    layer_map: Mapping[str, tuple[int | None, ...]] | None,
    *,
    taking_turns: bool = False,
) -> tuple[tuple[str, ...], LayerMap]:
    """The teachers to use, and the layer map of those that have one.

    Raises MismatchError where the cache lacks a teacher or layer, RecipeError where layer maps differ in length, which
    those may whose layers take turns.
    """
    names = tuple(cache.teachers) if teachers is None else tuple(teachers)
    for name in names:
        if name not in cache.teachers:
            known = ", ".join(cache.teachers) or "none"
            raise MismatchError(
                f"cache '{cache.path}' has no teacher '{name}'; it has: {known}",
                "Choose among these with distill.teachers, or add the teacher: kdcache dump-teachers",
            )
    chosen = {name: tuple(layer_map[name]) for name in names if layer_map and name in layer_map}
    lengths = {name: len(layers) for name, layers in chosen.items()}
    if len(set(lengths.values())) > 1 and not taking_turns:
        told = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise RecipeError(
            f"the layer map must give one teacher layer per student layer for every teacher; it gives {told}",
            "Make the lists in distill.teacher_layers equally long.",
        )
    for name, layers in chosen.items():
        _check_layers(cache, name, layers_read(layers))
    return names, chosen


def even_layer_map(cache: Cache, teachers: Sequence[str] | None, student_layers: int) -> LayerMap:
    """The teacher layer g(j) = round(j * depth / K) for each student layer j = 1..K, for every teacher (MT-BERT,
    section 3.2).
    """
    names, _ = chosen_teachers(cache, teachers, None)
    return {name: even_layers(cache.teachers[name].depth, student_layers) for name in names}


def largest_max_length(cache: Cache) -> int:
    """The longest that any teacher of the cache was given, in tokens."""
    return max((spec.max_length for spec in cache.teachers.values()), default=128)


def files_used(
    cache: Cache,
    parts: Sequence[int],
    teachers: Sequence[str],
    layers: Mapping[str, tuple[int, ...]],
    *,
    logits: bool,
    texts: bool = False,
) -> list[str]:
    """The files that batches from ``parts`` are made of, part by part, by their names in the manifest."""
    files: list[str] = []
    for part in (cache.parts[index].name for index in parts):
        files += [layout.ids_file(part), *([layout.text_file(part)] if texts else [])]
        for teacher in teachers:
            if logits:
                files.append(layout.outputs_file(teacher, part))
            stored = {layer: cache.teachers[teacher].layers[layer] for layer in layers.get(teacher, ())}
            files += [layout.tokens_file(teacher, part)] if needs_tokens(stored) else []
            files += [layout.group_file(teacher, part)] if stored else []
            for layer, spec in stored.items():
                files += layout.layer_files(teacher, part, layer, spec, cache.row_count(teacher, part, layer))
    return files


def _check_layers(cache: Cache, name: str, layers: Sequence[int]) -> None:
    stored = cache.teachers[name].layers
    lacking = sorted({layer for layer in layers if layer not in stored})
    if lacking:
        known = ", ".join(str(layer) for layer in sorted(stored)) or "none"
        wanted = ", ".join(str(layer) for layer in lacking)
        raise MismatchError(
            f"cache '{cache.path}' has no hidden states of layer {wanted} of teacher '{name}'; it has layers: {known}",
            "Add them to dump.layers and run kdcache dump-teachers again: only what is missing is dumped.",
        )


@dataclass(frozen=True, eq=False)
class Form:
    """How the targets of one layer come: which tokens, and what decodes their values where these are no numbers yet."""

    tokens: TokenSelection = "all"
    decoder: Decoder | None = None


Forms = dict[tuple[str, int], Form]  # (teacher, its layer)


def stored_forms(cache: Cache, layer_map: Mapping[str, tuple[int, ...]]) -> Forms:
    """The forms of the layers that are used; reads the bases of those that cannot be decoded without."""
    forms: Forms = {}
    for teacher, layers in layer_map.items():
        for layer in sorted(set(layers)):
            spec = cache.teachers[teacher].layers[layer]
            forms[teacher, layer] = Form(spec.tokens, format_of(spec).decoder(_basis(cache, teacher, layer)))
    return forms


def target_dim(cache: Cache, teacher: str, layer: int) -> int:
    """Width of the stored targets."""
    spec = cache.teachers[teacher].layers[layer]
    return format_of(spec).dim(spec, _basis(cache, teacher, layer))


def _basis(cache: Cache, teacher: str, layer: int) -> Basis | None:
    """The basis, where the layer's format needs it to decode."""
    return cache.basis(teacher, layer) if format_of(cache.teachers[teacher].layers[layer]).needs_basis else None
