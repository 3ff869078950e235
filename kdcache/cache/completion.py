"""What of the contents may be published: whole components only.

What an earlier, interrupted run began and this one did not ask for is left out unless it is complete; what the old manifest
held, or this run declared, must be complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.errors import DamageError, KdcacheError, MismatchError

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.cache.spec import TeacherSpec


def complete_contents(root: Path, contents: Contents, published: Contents | None, asked: Mapping[str, TeacherSpec]) -> Contents:
    """The contents to publish. Raises MismatchError, KdcacheError or DamageError where something wanted is not complete."""
    before = published.teachers if published else {}
    teachers = {}
    for name, spec in contents.teachers.items():
        if not contents.teacher_is_complete(name):
            _refuse(root, contents, name, name in asked, name in before, f"teacher '{name}'")
            continue
        layers = {}
        for layer, one in spec.layers.items():
            if contents.layer_is_complete(name, layer):
                layers[layer] = one
                continue
            wanted = name in asked and layer in asked[name].layers
            kept = name in before and layer in before[name].layers
            _refuse(root, contents, name, wanted, kept, f"layer {layer} of teacher '{name}'")
        teachers[name] = replace(spec, layers=layers)
    tokens = {
        name: {part.name: contents.tokens[name][part.name] for part in contents.parts if contents.has_tokens(name, part)}
        for name in teachers
    }
    made = replace(contents, teachers=teachers, tokens=tokens, lost={})
    expected = made.expected_files()
    for path, what in expected.items():
        if path not in contents.files:
            raise DamageError(f"cache '{root}' lacks '{path}' ({what})", "Run the dump again with --repair.")
    return replace(made, files={path: contents.files[path] for path in expected})


def _refuse(root: Path, contents: Contents, name: str, asked: bool, published: bool, what: str) -> None:
    lacking = [part.name for part in contents.parts if not contents.has_outputs(name, part)]
    where = f" (from {lacking[0]} on)" if lacking else ""
    if asked:
        raise KdcacheError(f"cache '{root}': {what} is not complete{where}", "Run the same dump again: it continues.")
    if published:
        raise MismatchError(
            f"cache '{root}' holds {what}, which lacks the texts that were added{where}",
            "Name every teacher of the cache in the recipe, so that each gets the new texts; or dump into a new directory.",
        )
