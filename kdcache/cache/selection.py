"""Selections: ``.selection.json`` says which part of a cache is in a directory that has the manifest of the whole.

To use one teacher's logits, it is enough to pull these files and the full manifest. The identity is that of the whole
cache. A read of a file that was not pulled is refused by name, with the command that fetches it. A directory without
the file holds everything. The file is not part of the identity. It may come from somebody else, so it is parsed
strictly and within bounds.

    {"format": "kdcache-selection", "version": 1, "teachers": {"bert": [6, 12], "roberta": []}, "text": "no",
     "complete": "yes", "origin": "sst2-3t@3"}

A selection always includes text ids and examples; for each teacher its tokenizer and outputs; for each layer its hidden
states, basis and array metadata, and the teacher's tokens. So a student can be trained from every selection.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import pydantic
from pydantic import Field

from kdcache.cache.canonical import NotCanonicalError, parse_json, readable_json
from kdcache.cache.schema import Strict, TeacherName, fault_of
from kdcache.errors import DamageError, MismatchError
from kdcache.files import remove_file, write_file

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents

SELECTION = ".selection.json"
MAX_BYTES = 8 << 20  # the largest selection that a manifest allows is smaller
_FORMAT = "kdcache-selection"
_LAYER = re.compile(r"layer-([0-9]{2,4})")


@dataclass(frozen=True)
class Selection:
    """Teacher -> its layers (``()``: logits only), None for all teachers and layers; and whether texts are included."""

    teachers: Mapping[str, tuple[int, ...]] | None = None
    text: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether it includes everything of any cache."""
        return self.teachers is None and self.text

    def covers(self, contents: Contents) -> set[str]:
        """The files of ``contents`` in this selection, by name in the manifest."""
        return {path for path in contents.files if self.takes(path)}

    def takes(self, path: str) -> bool:
        """Whether a file, by name in the manifest, is in this selection."""
        place = component(path)
        if place.teacher is None:
            return self.text or not place.is_text
        if self.teachers is None:
            return True
        layers = self.teachers.get(place.teacher)
        if layers is None:
            return False
        return place.layer in layers if place.layer is not None else bool(layers) or not place.of_layers


@dataclass(frozen=True)
class LocalSelection:
    """The content of ``.selection.json``; ``complete`` is False while selected files are not fetched yet."""

    selection: Selection
    complete: bool = True
    origin: str = ""  # the name and version that it was pulled from: "sst2-3t@3"


class Component(NamedTuple):
    """What a file belongs to: the texts, a teacher, a layer, all layers (``of_layers`` without ``layer``), or all."""

    teacher: str | None = None
    layer: int | None = None
    of_layers: bool = False
    is_text: bool = False


def component(path: str) -> Component:
    """The component of a file, from its name in the manifest."""
    steps = path.split("/")
    if steps[0] != "teachers" or len(steps) < 4:  # a damaged commit record may list other paths
        return Component(is_text=steps[0] == "text")
    match = _LAYER.match(steps[3] if steps[2] == "basis" else "".join(steps[4:5]))
    if match:
        return Component(steps[1], int(match[1]), of_layers=True)
    return Component(steps[1], of_layers=steps[2] in ("tokens", "hidden", "basis"))


def union(first: Selection, second: Selection) -> Selection:
    """Everything that is in at least one of the two."""
    text = first.text or second.text
    if first.teachers is None or second.teachers is None:
        return Selection(None, text)
    names = [*first.teachers, *(name for name in second.teachers if name not in first.teachers)]
    both = {name: {*first.teachers.get(name, ()), *second.teachers.get(name, ())} for name in names}
    return Selection({name: tuple(sorted(layers)) for name, layers in both.items()}, text)


def choose(
    contents: Contents,
    teachers: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    *,
    hidden: bool = True,
    text: bool = True,
) -> Selection:
    """The selection of some teachers (None: all) with those of ``layers`` (None: all) that they have.

    Raises MismatchError for a teacher that the cache lacks, or a layer that none of these teachers has.
    """
    if teachers is None and hidden and layers is None:
        return Selection(None, text)
    names = list(contents.teachers) if teachers is None else list(dict.fromkeys(teachers))
    for name in names:
        if name not in contents.teachers:
            known = ", ".join(contents.teachers) or "none"
            raise MismatchError(
                f"the cache has no teacher '{name}'; it has: {known}", "Choose among these with --teachers."
            )
    stored = {name: tuple(sorted(contents.teachers[name].layers)) for name in names}
    for layer in layers or ():
        if hidden and not any(layer in of_teacher for of_teacher in stored.values()):
            shown = "; ".join(f"{name}: {', '.join(map(str, has)) or 'none'}" for name, has in stored.items())
            raise MismatchError(
                f"the cache has no layer {layer} of {', '.join(names)}; it has {shown}",
                "Choose among these with --layers.",
            )
    wanted = {
        name: has if layers is None else tuple(layer for layer in has if layer in layers)
        for name, has in stored.items()
    }
    return Selection({name: chosen if hidden else () for name, chosen in wanted.items()}, text)


def selection_here(root: Path, contents: Contents) -> Selection:
    """The texts, teachers and layers of which every file is in a directory."""
    lacking = {component(path) for path in contents.files if not (root / path).is_file()}
    text = not any(place.is_text for place in lacking)
    if not any(place.teacher for place in lacking):
        return Selection(None, text)
    teachers = {}
    for name, spec in contents.teachers.items():
        if Component(name) in lacking:
            continue
        common = Component(name, of_layers=True) in lacking
        there = [layer for layer in spec.layers if not common and Component(name, layer, of_layers=True) not in lacking]
        teachers[name] = tuple(sorted(there))
    return Selection(teachers, text)


def read_local(root: Path) -> LocalSelection | None:
    """Read and check ``.selection.json``; None if there is none. Raises DamageError."""
    path = root / SELECTION
    if not path.is_symlink() and not path.exists():
        return None
    if path.is_symlink() or not path.is_file():
        raise DamageError(f"'{path}' is not a plain file", "Remove it, and pull the cache again.")
    hint = "Remove it, and pull the cache again: kdcache cache pull NAME --to DIR"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        model = _SelectionModel.model_validate(parse_json(path.read_bytes()))
    except pydantic.ValidationError as error:
        raise DamageError(f"'{path}' is not a selection: {fault_of(error)}", hint) from error
    except (OSError, NotCanonicalError, ValueError) as error:
        raise DamageError(f"'{path}' is not a selection: {error}", hint) from error
    teachers = (
        None if model.teachers == "all" else {name: tuple(sorted(layers)) for name, layers in model.teachers.items()}
    )
    return LocalSelection(Selection(teachers, model.text == "yes"), model.complete == "yes", model.origin)


def write_selection(root: Path, selection: Selection, *, complete: bool = True, origin: str = "") -> None:
    """Write ``.selection.json``; for a whole, complete cache remove it instead."""
    if selection.is_whole and complete:
        remove_file(root / SELECTION)
        return
    teachers = (
        "all" if selection.teachers is None else {name: sorted(layers) for name, layers in selection.teachers.items()}
    )
    document = {
        "format": _FORMAT,
        "version": 1,
        "teachers": teachers,
        "text": _word(selection.text),
        "complete": _word(complete),
    }
    write_file(root / SELECTION, readable_json(document | ({"origin": origin} if origin else {})))


def local_selection(root: Path, contents: Contents) -> LocalSelection | None:
    """Like ``read_local``; DamageError also if it names a teacher or layer that the manifest does not have."""
    local = read_local(root)
    for name, layers in ({} if local is None else local.selection.teachers or {}).items():
        what = None
        if name not in contents.teachers:
            what = f"teacher '{name}'"
        elif lacking := set(layers) - contents.teachers[name].layers.keys():
            what = f"layer {min(lacking)} of teacher '{name}'"
        if what:
            raise DamageError(
                f"'{root / SELECTION}' selects {what}, which the manifest does not have",
                "Remove it, and pull the cache again.",
            )
    return local


def not_here(root: Path, local: LocalSelection, path: str) -> MismatchError:
    """The error for a file outside the selection: what it belongs to, and the command that fetches it."""
    place = component(path)
    flags = []
    if place.is_text:
        what = "the texts"
        flags += ["--no-hidden"]
        if local.selection.teachers:
            flags.insert(0, f"--teachers {','.join(local.selection.teachers)}")
    elif place.of_layers:
        layer = f" {place.layer}" if place.layer is not None else ""
        what = (
            f"layer{layer} of teacher '{place.teacher}'" if layer else f"the hidden states of teacher '{place.teacher}'"
        )
        flags += [f"--teachers {place.teacher}", *([f"--layers{layer}"] if layer else [])]
    else:
        what = f"teacher '{place.teacher}'"
        flags += [f"--teachers {place.teacher}", "--no-hidden"]
    if not local.selection.text and not place.is_text:
        flags.append("--no-text")
    name = local.origin or "NAME"
    return MismatchError(
        f"cache '{root}' was pulled in part: {what} was not pulled",
        f"Fetch it with: kdcache cache pull {name} {' '.join(flags)} --to {shlex.quote(str(root))}",
    )


def not_yet_here(root: Path, local: LocalSelection, path: str) -> MismatchError:
    """The error for a selected file that was not fetched yet."""
    teachers = local.selection.teachers
    flags = [] if teachers is None else [f"--teachers {','.join(teachers)}"]
    if teachers is not None and not any(teachers.values()):
        flags.append("--no-hidden")
    elif teachers is not None:
        numbers = sorted({layer for layers in teachers.values() for layer in layers})
        flags.append(f"--layers {','.join(map(str, numbers))}")
    flags += [] if local.selection.text else ["--no-text"]
    command = ["kdcache cache pull", local.origin or "NAME", *flags, "--to", shlex.quote(str(root))]
    return MismatchError(
        f"cache '{root}' is not complete: '{path}' was not fetched yet", f"Complete it with: {' '.join(command)}"
    )


def _word(value: bool) -> str:
    return "yes" if value else "no"


_Layers = Annotated[list[Annotated[int, Field(ge=0, le=9999)]], Field(max_length=1000)]


class _SelectionModel(Strict):
    format: Literal["kdcache-selection"]
    version: Literal[1]
    teachers: Literal["all"] | Annotated[dict[TeacherName, _Layers], Field(max_length=1000)]
    text: Literal["yes", "no"]
    complete: Literal["yes", "no"]
    origin: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9._-]{0,63}(@[0-9]{1,12})?)?$")] = ""
