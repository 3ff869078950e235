"""What of a cache is used: splits, teachers and their layers, each checked by name before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.cache.spec import PART_SIZE, chosen_part_size, needs_tokens
from kdcache.codecs.registry import format_of
from kdcache.errors import MismatchError, RecipeError
from kdcache.methods.parts.layer_map import LayerMap, LayersOfEpoch, even_layers, layers_read

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.codecs.base import Basis, Decoder, TokenSelection


@dataclass(frozen=True)
class TargetChoice:
    """Which outputs of which teachers a student learns from.

    Attributes:
        teachers: names, in the order that batches have.
        layer_map: per teacher one of its layers for each student layer 1..K, None for a student layer without partner;
            empty where no hidden states are read. With ``layers_at`` it names all layers that any epoch uses.
        layers_at: epoch -> layer map, where the map changes from epoch to epoch.
        logits: whether logits are read.
    """

    teachers: tuple[str, ...]
    layer_map: LayerMap = field(default_factory=dict)
    layers_at: LayersOfEpoch | None = None
    logits: bool = True

    @property
    def used(self) -> dict[str, tuple[int, ...]]:
        """The layers of each teacher that are read, ascending."""
        return {name: layers_read(self.layer_map[name]) for name in self.teachers if name in self.layer_map}

    @property
    def has_targets(self) -> bool:
        """Whether anything of a teacher is read."""
        return bool(self.teachers) and (self.logits or bool(self.layer_map))

    def at_epoch(self, epoch: int) -> LayerMap:
        """The layer map of an epoch."""
        return self.layer_map if self.layers_at is None else self.layers_at(epoch)

    def check(self, cache: Cache) -> None:
        """Check teachers and layers against ``cache``.

        Raises MismatchError where the cache lacks a teacher or a layer, RecipeError where layer maps differ in length,
        which they may only with ``layers_at``.
        """
        check_teacher_names(cache, self.teachers)
        lengths = {name: len(layers) for name, layers in self.layer_map.items()}
        if len(set(lengths.values())) > 1 and self.layers_at is None:
            given = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise RecipeError(
                f"the layer map must give one teacher layer per student layer for every teacher; it gives {given}",
                "Make the lists in distill.teacher_layers equally long.",
            )
        for name, layers in self.used.items():
            _check_layers(cache, name, layers)


def check_teacher_names(cache: Cache, names: Sequence[str]) -> None:
    """Raise MismatchError where the cache lacks a teacher."""
    for name in names:
        if name not in cache.teachers:
            known = ", ".join(cache.teachers) or "none"
            raise MismatchError(
                f"cache '{cache.path}' has no teacher '{name}'; it has: {known}",
                "Choose among these with distill.teachers, or add the teacher: kdcache dump-teachers",
            )


def even_layer_map(cache: Cache, teachers: Sequence[str], student_layers: int) -> LayerMap:
    """Every teacher's layer g(j) = round(j * depth / K) for student layers j = 1..K (MT-BERT, section 3.2)."""
    check_teacher_names(cache, teachers)
    return {name: even_layers(cache.teachers[name].depth, student_layers) for name in teachers}


WINDOW = 8  # parts from which batches are drawn


def chosen_window(cache: Cache | None) -> int:
    """The window where a recipe has none: 8 parts, or as many larger ones as have the texts of 8 parts of 4,096.

    Larger are parts of a cache of so many texts that a dump chose their size; a part size that somebody chose for fewer
    texts keeps its 8.
    """
    size = PART_SIZE if cache is None else cache.settings.part_size
    if cache is None or not PART_SIZE < size <= chosen_part_size(sum(part.texts for part in cache.parts)):
        return WINDOW
    return max(1, WINDOW * PART_SIZE // size)


def largest_max_length(cache: Cache) -> int:
    """The largest ``max_length`` of the cache's teachers, in tokens; 128 without teachers that kdcache ran."""
    return max((spec.max_length for spec in cache.teachers.values() if not spec.imported), default=128)


def files_used(
    cache: Cache, parts: Sequence[int], teachers: Sequence[str], layers: Mapping[str, tuple[int, ...]], *, logits: bool
) -> list[str]:
    """The files that batches from ``parts`` read, part by part, by their names in the manifest."""
    files: list[str] = []
    for part, scope in ((cache.parts[index].name, cache.parts[index].scope) for index in parts):
        files.append(layout.ids_file(part))
        for teacher in teachers:
            if logits:
                files.append(layout.outputs_file(teacher, part))
            wanted = layers.get(teacher, ()) if scope == "full" else ()
            stored = {layer: cache.teachers[teacher].layers[layer] for layer in wanted}
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
        if cache.teachers[name].imported:
            raise MismatchError(
                f"teacher '{name}' of cache '{cache.path}' was imported from a file: it has no hidden states",
                "Choose a method that needs logits only (see: kdcache methods), or leave it out of distill.teachers.",
            )
        raise MismatchError(
            f"cache '{cache.path}' has no hidden states of layer {wanted} of teacher '{name}'; it has layers: {known}",
            "Add them to dump.layers and run kdcache dump-teachers again: only what is missing is dumped.",
        )


@dataclass(frozen=True, eq=False)
class StoredFormat:
    """How one layer's targets come: for which tokens, and the decoder of values that are codes, not numbers."""

    tokens: TokenSelection = "all"
    decoder: Decoder | None = None


StoredFormats = dict[tuple[str, int], StoredFormat]  # by teacher and its layer


def stored_formats(cache: Cache, layers: Mapping[str, tuple[int, ...]]) -> StoredFormats:
    """The formats of the ``layers`` of each teacher; reads a layer's basis where its decoder needs one."""
    return {
        (teacher, layer): StoredFormat(spec.tokens, format_of(spec).decoder(_basis(cache, teacher, layer)))
        for teacher, own in layers.items()
        for layer in own
        for spec in [cache.teachers[teacher].layers[layer]]
    }


def target_dim(cache: Cache, teacher: str, layer: int) -> int:
    """Width of the stored targets."""
    spec = cache.teachers[teacher].layers[layer]
    return format_of(spec).dim(spec, _basis(cache, teacher, layer))


def _basis(cache: Cache, teacher: str, layer: int) -> Basis | None:
    """The basis, where the layer's format needs it to decode."""
    return cache.basis(teacher, layer) if format_of(cache.teachers[teacher].layers[layer]).needs_basis else None
