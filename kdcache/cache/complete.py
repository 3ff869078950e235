"""What of a directory is complete, so that a manifest may list it, and what an interrupted dump left."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.cache.stale import existing_layers, has_any, published_layers
from kdcache.errors import DamageError, KdcacheError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kdcache.cache.contents import Contents
    from kdcache.cache.spec import TeacherSpec


def complete_contents(
    root: Path, contents: Contents, published: Contents | None, asked: Mapping[str, TeacherSpec]
) -> Contents:
    """The contents to publish. Raises MismatchError, KdcacheError or DamageError if a component is not complete."""
    before = published.teachers if published else {}
    teachers = {}
    for name, spec in contents.teachers.items():
        if not contents.teacher_is_complete(name):
            _refuse(root, contents, name, name in asked, name in before, f"teacher '{name}'")
            continue
        layers = {}
        for layer, layer_spec in spec.layers.items():
            if contents.layer_is_complete(name, layer):
                layers[layer] = layer_spec
                continue
            wanted = name in asked and layer in asked[name].layers
            kept = name in before and layer in before[name].layers
            _refuse(root, contents, name, wanted, kept, f"layer {layer} of teacher '{name}'")
        teachers[name] = replace(spec, layers=layers)
    tokens = {
        name: {
            part.name: contents.tokens[name][part.name] for part in contents.parts if contents.has_tokens(name, part)
        }
        for name in teachers
    }
    made = replace(contents, teachers=teachers, tokens=tokens, lost={})
    expected = made.expected_files()
    for path, file in expected.items():
        if path not in contents.files:
            raise DamageError(f"cache '{root}' lacks '{path}' ({file.what})", "Run the dump again with --repair.")
    return replace(made, files={path: contents.files[path] for path in expected})


def _refuse(root: Path, contents: Contents, name: str, asked: bool, published: bool, what: str) -> None:
    lacking = [part.name for part in contents.parts if not contents.has_outputs(name, part)]
    where = f" (from {lacking[0]} on)" if lacking else ""
    if asked:
        raise KdcacheError(f"cache '{root}': {what} is not complete{where}", "Run the same dump again: it continues.")
    if published:
        raise MismatchError(
            f"cache '{root}' holds {what}, which lacks the texts that were added{where}",
            "Name every teacher of the cache in the recipe, so that each gets the new texts; or dump into a new "
            "directory.",
        )


def unfinished_teachers(contents: Contents, published: Contents, fitted_on: int) -> list[str]:
    """The teachers of which ``contents`` has outputs, a layer or a basis that ``published`` has not.

    ``fitted_on``: texts with hidden states when bases were fitted. Where more came since, and these were fewer than the
    sample, a dump of all texts would fit other bases; such a teacher is left out, and starts again.
    """
    names = []
    for name, spec in contents.teachers.items():
        begun = existing_layers(contents, None, name) - published_layers(published, name)
        fitted = any(layout.basis_file(name, layer) in contents.files for layer in begun)
        if fitted and fitted_on < min(spec.sample_texts, contents.full_texts):
            continue
        if begun or (name not in published.teachers and has_any(contents, None, name)):
            names.append(name)
    return names
