"""Which part of a cache is in a directory: ``.selection.json`` beside the manifest of the whole.

A colleague who wants one teacher's logits pulls those files and the full manifest: the identity is that of the whole
cache, and what is not here is refused by name, with the command that fetches it. A directory without the file holds
everything. The file lies outside the identity; like all of a cache it may come from somebody else, so it is bounded and
read strictly.

    {"format": "kdcache-selection", "version": 1, "teachers": {"bert": [6, 12], "roberta": []}, "text": "no",
     "complete": "yes", "origin": "sst2-3t@3"}

What comes along: text ids and examples always; of a selected teacher its tokenizer and outputs; with a layer its hidden
states, its basis, the metadata of its arrays and the teacher's tokens. So every selection can be distilled from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from kdcache.cache.canonical import NotCanonicalError, parse_json, readable_json
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
    """Teachers with the layers of each, ``()`` for logits only.

    ``None`` for every teacher and layer. And whether texts are in.
    """

    teachers: Mapping[str, tuple[int, ...]] | None = None
    text: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out, whatever the cache holds."""
        return self.teachers is None and self.text

    def covers(self, contents: Contents) -> set[str]:
        """The files of ``contents`` that belong to this selection, by their names in the manifest."""
        return {path for path in contents.files if self.takes(path)}

    def takes(self, path: str) -> bool:
        """Whether a file of a cache, by its name in the manifest, belongs to this selection."""
        place = component(path)
        if place.teacher is None:
            return self.text or not place.is_text
        if self.teachers is None:
            return True
        layers = self.teachers.get(place.teacher)
        if layers is None:
            return False
        return place.layer in layers if place.layer is not None else bool(layers) or not place.of_layers

    def lacks(self, other: Selection, contents: Contents) -> bool:
        """Whether ``other`` takes a file of ``contents`` that this one does not."""
        return not other.covers(contents) <= self.covers(contents)


@dataclass(frozen=True)
class LocalSelection:
    """What ``.selection.json`` says: ``complete`` is False while selected files are still to be fetched."""

    selection: Selection
    complete: bool = True
    origin: str = ""  # the name and version that it was pulled from: "sst2-3t@3"


@dataclass(frozen=True)
class Component:
    """What a file belongs to.

    The texts, a teacher, one of its layers (``of_layers``: all of its layers), or everything.
    """

    teacher: str | None = None
    layer: int | None = None
    of_layers: bool = False
    is_text: bool = False


def component(path: str) -> Component:
    """What a file of a cache belongs to, from its name in the manifest."""
    steps = path.split("/")
    if steps[0] != "teachers":
        return Component(is_text=steps[0] == "text")
    for step in steps[3:]:
        found = _LAYER.match(step)
        if found:
            return Component(steps[1], int(found[1]), of_layers=True)
    return Component(steps[1], of_layers=steps[2] in ("tokens", "hidden", "basis"))


def union(one: Selection, other: Selection) -> Selection:
    """What at least one of the two takes."""
    text = one.text or other.text
    if one.teachers is None or other.teachers is None:
        return Selection(None, text)
    names = [*one.teachers, *(name for name in other.teachers if name not in one.teachers)]
    both = {name: {*one.teachers.get(name, ()), *other.teachers.get(name, ())} for name in names}
    return Selection({name: tuple(sorted(layers)) for name, layers in both.items()}, text)


def choose(
    contents: Contents,
    teachers: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    *,
    hidden: bool = True,
    text: bool = True,
) -> Selection:
    """The selection that flags ask for: of the chosen teachers (None: all) those of ``layers`` (None: all) that they
    have.

    Raises MismatchError for a teacher that the cache lacks, and for a layer that none of the chosen teachers has.
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
        if hidden and not any(layer in one for one in stored.values()):
            told = "; ".join(f"{name}: {', '.join(map(str, one)) or 'none'}" for name, one in stored.items())
            raise MismatchError(
                f"the cache has no layer {layer} of {', '.join(names)}; it has {told}",
                "Choose among these with --layers.",
            )
    wanted = {
        name: one if layers is None else tuple(layer for layer in one if layer in layers)
        for name, one in stored.items()
    }
    return Selection({name: one if hidden else () for name, one in wanted.items()}, text)


def selection_here(root: Path, contents: Contents) -> Selection:
    """What of a cache is wholly in a directory, found by looking.

    Texts, teachers and layers of which every file is there.
    """
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


def read_selection(root: Path) -> Selection | None:
    """What of a cache is in a directory.

    None where it is the whole. Raises DamageError for a file that is not a selection.
    """
    local = read_local(root)
    return None if local is None else local.selection


def read_local(root: Path) -> LocalSelection | None:
    """``.selection.json``, checked; None where there is none. Raises DamageError."""
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
        first = error.errors()[0]
        where = ".".join(str(step)[:80] for step in first["loc"])
        raise DamageError(f"'{path}' is not a selection: {where}: {first['msg']}", hint) from error
    except (OSError, NotCanonicalError, ValueError) as error:
        raise DamageError(f"'{path}' is not a selection: {error}", hint) from error
    teachers = None if model.teachers == "all" else {name: tuple(sorted(one)) for name, one in model.teachers.items()}
    return LocalSelection(Selection(teachers, model.text == "yes"), model.complete == "yes", model.origin)


def write_selection(root: Path, selection: Selection, *, complete: bool = True, origin: str = "") -> None:
    """Say what of a cache is in a directory; for a whole, complete one nothing is said and an older file is removed."""
    if selection.is_whole and complete:
        remove_file(root / SELECTION)
        return
    teachers = "all" if selection.teachers is None else {name: sorted(one) for name, one in selection.teachers.items()}
    document = {
        "format": _FORMAT,
        "version": 1,
        "teachers": teachers,
        "text": _word(selection.text),
        "complete": _word(complete),
    }
    write_file(root / SELECTION, readable_json(document | ({"origin": origin} if origin else {})))


def local_selection(root: Path, contents: Contents) -> LocalSelection | None:
    """``read_local``, and DamageError where it names a teacher or a layer that the manifest beside it does not have."""
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
    """The refusal of a file that the manifest lists and the selection leaves out.

    What it belongs to, and how to fetch it.
    """
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
        f"cache '{root}' is a part of its whole: {what} was not pulled",
        f"Fetch it with: kdcache cache pull {name} {' '.join(flags)} --to {root}",
    )


def not_yet_here(root: Path, local: LocalSelection, path: str) -> MismatchError:
    """The refusal of a file that is selected and was not fetched yet."""
    teachers = local.selection.teachers
    flags = [] if teachers is None else [f"--teachers {','.join(teachers)}"]
    if teachers is not None and not any(teachers.values()):
        flags.append("--no-hidden")
    elif teachers is not None:
        flags.append(
            f"--layers {','.join(str(layer) for layer in sorted({n for one in teachers.values() for n in one}))}"
        )
    flags += [] if local.selection.text else ["--no-text"]
    return MismatchError(
        f"cache '{root}' is not complete: '{path}' was not fetched yet",
        f"Complete it with: {' '.join(['kdcache cache pull', local.origin or 'NAME', *flags])} --to {root}",
    )


def _word(value: bool) -> str:
    return "yes" if value else "no"


_Teacher = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Layers = Annotated[list[Annotated[int, Field(ge=0, le=9999)]], Field(max_length=1000)]


class _SelectionModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["kdcache-selection"]
    version: Literal[1]
    teachers: Literal["all"] | Annotated[dict[_Teacher, _Layers], Field(max_length=1000)]
    text: Literal["yes", "no"]
    complete: Literal["yes", "no"]
    origin: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9._-]{0,63}(@[0-9]{1,12})?)?$")] = ""
