"""Refuses a dump into a cache that is stale: one that differs from the request in a field that its bytes depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdcache.cache import layout
from kdcache.cache.spec import differing_fields
from kdcache.errors import MismatchError
from kdcache.progress import listed_apart

if TYPE_CHECKING:
    from pathlib import Path

    from kdcache.cache.contents import Contents
    from kdcache.cache.spec import Settings, TaskSpec, TeacherSpec


_HINT = "Ask for what the cache was made with, or dump into a new directory."
_TEACHER_HINT = "Ask for what the cache was made with, give the teacher another name, or dump into a new directory."
_FOLDS_HINT = "Dump into a new directory; dump.out_of_fold = false stores the logits of the teacher itself."
_OF_LAYERS = ("layers", "sample_texts")  # a teacher's outputs do not depend on these


def check_task(root: Path, old: tuple[TaskSpec, Settings, bool], new: tuple[TaskSpec, Settings, bool]) -> None:
    """Raises MismatchError, which names the field, if a cache has another task or other settings."""
    for old_values, new_values in zip(old[:2], new[:2], strict=True):
        for name, before, now in differing_fields(old_values, new_values):
            if isinstance(before, tuple) and isinstance(now, tuple):
                shown = [f"[{names}]" for names in listed_apart([*map(repr, before)], [*map(repr, now)])]
            else:
                shown = [_show(before), _show(now)]
            raise MismatchError(f"cache '{root}' was made with {name} {shown[0]}; now it is {shown[1]}", _HINT)
    if old[2] != new[2]:
        raise MismatchError(f"cache '{root}' was made {_text(old[2])}; now it is requested {_text(new[2])}", _HINT)


def check_teacher(
    root: Path, old: TeacherSpec, new: TeacherSpec, existing_layers: set[int], *, published: set[int] | None
) -> None:
    """Raises MismatchError if a teacher, or an existing layer of it, differs from the request.

    ``published``: its layers in the manifest, None if it is not there. The rest is from an interrupted dump, and may be
    discarded.
    """
    left = root / layout.STATE / "teachers" / old.name
    discard = f"Ask for the same, or discard what an interrupted dump left of it: delete '{left}'."
    hint = discard if published is None else _TEACHER_HINT
    for name, before, now in differing_fields(old, new, "{} (sha256)"):
        if name == "folds":
            shown = [str(folds or "the teacher itself") for folds in (before, now)]
            raise MismatchError(
                f"cache '{root}' has logits of the train texts of teacher '{old.name}' from {shown[0]}; now they come "
                f"from {shown[1]}",
                _FOLDS_HINT,
            )
        if name not in _OF_LAYERS:
            raise _mismatch(root, old.name, name, before, now, hint)
    if existing_layers and new.layers and old.sample_texts != new.sample_texts:
        hint = _TEACHER_HINT if published else discard
        raise _mismatch(root, old.name, "sample_texts", old.sample_texts, new.sample_texts, hint)
    for layer in sorted(existing_layers & new.layers.keys()):
        hint = _TEACHER_HINT if layer in (published or ()) else discard
        for name, before, now in differing_fields(old.layers[layer], new.layers[layer]):
            raise _mismatch(root, old.name, f"{name} of layer {layer}", before, now, hint)


def _mismatch(root: Path, teacher: str, name: str, before: Any, now: Any, hint: str) -> MismatchError:
    message = f"cache '{root}' holds teacher '{teacher}' with {name} {_show(before)}; now it is {_show(now)}"
    return MismatchError(message, hint)


def _show(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _text(stored: bool) -> str:
    return "with its texts" if stored else "without its texts"


def has_any(contents: Contents, published: Contents | None, name: str) -> bool:
    """Whether any outputs of a teacher are there."""
    known = published is not None and name in published.teachers
    return known or any(contents.has_outputs(name, part) for part in contents.parts)


def existing_layers(contents: Contents, published: Contents | None, name: str) -> set[int]:
    """Layers of a teacher that are published, or have a basis or a part."""
    spec = contents.teachers.get(name)
    begun = {layer for layer in spec.layers if _layer_has_any(contents, name, layer)} if spec else set()
    return published_layers(published, name) | begun


def published_layers(published: Contents | None, name: str) -> set[int]:
    """Layers of a teacher in the manifest."""
    return set(published.teachers[name].layers) if published is not None and name in published.teachers else set()


def refuse_case_twin(root: Path, contents: Contents, name: str) -> None:
    """Raises MismatchError if the cache has a teacher whose name differs from ``name`` in case only."""
    for known in contents.teachers:
        if known != name and known.casefold() == name.casefold():
            raise MismatchError(
                f"cache '{root}' has a teacher '{known}'; '{name}' differs in case only", "Choose another name."
            )


def refuse_partial_layers(root: Path, contents: Contents, published: Contents | None, spec: TeacherSpec) -> None:
    """Raises MismatchError if a published layer that is not requested would lack the new texts."""
    for layer in sorted(published_layers(published, spec.name) - spec.layers.keys()):
        if not contents.layer_is_complete(spec.name, layer):
            raise MismatchError(
                f"cache '{root}' holds layer {layer} of teacher '{spec.name}', which the new texts would lack",
                f"Ask for layer {layer} as well, or dump into a new directory.",
            )


def _layer_has_any(contents: Contents, name: str, layer: int) -> bool:
    there = layout.basis_file(name, layer) in contents.files
    return there or any(contents.has_layer(name, part, layer) for part in contents.parts)
