"""What exists of a teacher: published, or begun by a dump that was interrupted. What exists must match; what does not is added."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.errors import MismatchError

if TYPE_CHECKING:
    from pathlib import Path

    from kdcache.cache.contents import Contents
    from kdcache.cache.spec import TeacherSpec


def has_any(contents: Contents, published: Contents | None, name: str) -> bool:
    """Whether anything that a teacher said is there."""
    known = published is not None and name in published.teachers
    return known or any(contents.has_outputs(name, part) for part in contents.parts)


def existing_layers(contents: Contents, published: Contents | None, name: str) -> set[int]:
    """Layers of a teacher that are published, or of which a basis or a part is there."""
    spec = contents.teachers.get(name)
    begun = {layer for layer in spec.layers if _layer_has_any(contents, name, layer)} if spec else set()
    return published_layers(published, name) | begun


def published_layers(published: Contents | None, name: str) -> set[int]:
    """Layers of a teacher that the manifest has."""
    return set(published.teachers[name].layers) if published is not None and name in published.teachers else set()


def refuse_case_twin(root: Path, contents: Contents, name: str) -> None:
    """MismatchError where a teacher's name differs from ``name`` in case only."""
    for known in contents.teachers:
        if known != name and known.casefold() == name.casefold():
            raise MismatchError(f"cache '{root}' has a teacher '{known}'; '{name}' differs in case only", "Choose another name.")


def refuse_partial_layers(root: Path, contents: Contents, published: Contents | None, spec: TeacherSpec) -> None:
    """MismatchError where a published layer that is not asked for would lack the new texts."""
    for layer in sorted(published_layers(published, spec.name) - spec.layers.keys()):
        if not contents.layer_is_complete(spec.name, layer):
            raise MismatchError(
                f"cache '{root}' holds layer {layer} of teacher '{spec.name}', which the new texts would lack",
                f"Ask for layer {layer} as well, or dump into a new directory.",
            )


def _layer_has_any(contents: Contents, name: str, layer: int) -> bool:
    there = layout.basis_file(name, layer) in contents.files
    return there or any(contents.has_layer(name, part, layer) for part in contents.parts)
