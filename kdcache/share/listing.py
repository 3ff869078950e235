"""For ``cache ls`` and ``cache status``: the caches on a remote and on this machine, and how they compare.

A remote is listed from its refs alone, so listing a store of terabytes takes a second. A damaged ref is shown as a
problem of its name and does not hide other names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.layout import MANIFEST
from kdcache.cache.manifest import read_manifest
from kdcache.cache.selection import local_selection
from kdcache.errors import DamageError, KdcacheError
from kdcache.progress import counted
from kdcache.share import keys as layout
from kdcache.share.presence import missing_of
from kdcache.share.pull import fetch_manifest
from kdcache.share.refs import Ref, all_histories, history, live, names_of

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.share.stores.base import Remote


@dataclass(frozen=True)
class Name:
    """A name on a remote and its versions, oldest first; ``problem``: why its refs cannot be read, or empty."""

    name: str
    versions: tuple[Ref, ...]
    problem: str = ""

    @property
    def forked(self) -> bool:
        """Whether two writers made the newest version at the same time."""
        newest = [ref for ref in self.versions if ref.number == self.versions[-1].number]  # empty if there are none
        return len({ref.manifest for ref in newest}) > 1


def names(remote: Remote, only: str | None = None) -> list[Name]:
    """Every name, or that one, with at least one version or a problem."""
    prefix = layout.refs_of(only) if only else layout.REFS
    listed = [_name(remote, name) for name in names_of(remote, prefix)]
    return [name for name in listed if name.versions or name.problem]


def _name(remote: Remote, name: str) -> Name:
    try:
        return Name(name, live(history(remote, name)))
    except KdcacheError as error:
        return Name(name, (), error.message)


@dataclass(frozen=True)
class Status:
    """How a cache directory compares with a remote."""

    path: str
    identity: str
    pushed_as: tuple[str, ...]  # name@number, newest last
    newest: dict[str, str]  # name -> name@number of its newest version, for names that have or had this cache
    differences: dict[str, list[str]]  # name -> how its newest version differs; empty if it is this cache
    files_missing: int  # on the remote
    bytes_missing: int
    not_pulled: int  # number of files that are not in the directory
    bytes_not_pulled: int
    selection: dict[str, Any] | None
    problems: dict[str, str]  # name -> why its refs cannot be read


def status(remote: Remote, path: Path) -> Status:
    """Compare a cache directory with the published versions.

    Raises DamageError if the directory, or the manifest of a version to compare with, is damaged; RemoteError.
    """
    manifest = read_manifest(path)
    contents = manifest.contents
    local = local_selection(path, contents)
    here = set(contents.files) if local is None else local.selection.covers(contents)
    away = contents.files.keys() - here
    pushed, newest, differences = [], {}, {}
    listed = _all_names(remote)
    for name, versions in ((entry.name, entry.versions) for entry in listed):
        mine = [ref for ref in versions if ref.identity == manifest.identity]
        origin = local is not None and local.origin.partition("@")[0] == name
        if not mine and not (origin and versions):
            continue
        pushed += [ref.pinned for ref in mine]
        newest[name] = versions[-1].pinned
        other = versions[-1].identity != manifest.identity
        differences[name] = differing(contents, fetch_manifest(remote, versions[-1]).contents) if other else []
    sizes = {layout.file_key(digest.sha256): digest.size for digest in contents.files.values()}
    missing = missing_of(remote, sizes)
    return Status(
        str(path),
        manifest.identity,
        tuple(pushed),
        newest,
        differences,
        files_missing=len(missing),
        bytes_missing=sum(sizes[key] for key in missing),
        not_pulled=len(away),
        bytes_not_pulled=sum(contents.files[file].size for file in away),
        selection=None if local is None else asdict(local.selection),
        problems={entry.name: entry.problem for entry in listed if entry.problem},
    )


def _all_names(remote: Remote) -> list[Name]:
    """Every name, from one listing; from one for each name where a ref is damaged."""
    try:
        return [Name(name, live(refs)) for name, refs in all_histories(remote).items()]
    except DamageError:
        return names(remote)


def differing(mine: Contents, other: Contents) -> list[str]:
    """How ``other`` differs from ``mine``, one line per component; empty if all data files are the same."""
    lines = [f"teacher '{name}' is new there" for name in other.teachers if name not in mine.teachers]
    lines += [f"teacher '{name}' is not there" for name in mine.teachers if name not in other.teachers]
    for name in mine.teachers.keys() & other.teachers.keys():
        here, there = mine.teachers[name], other.teachers[name]
        if here.fingerprints != there.fingerprints:
            lines.append(f"teacher '{name}' has other weights, config, head or tokenizer there")
        new, absent = there.layers.keys() - here.layers.keys(), here.layers.keys() - there.layers.keys()
        lines += [f"layer {layer} of teacher '{name}' is new there" for layer in sorted(new)]
        lines += [f"layer {layer} of teacher '{name}' is not there" for layer in sorted(absent)]
    texts = [sum(part.texts for part in contents.parts) for contents in (mine, other)]
    if texts[0] != texts[1]:
        lines.append(f"it has {texts[1]:,} texts, this one {texts[0]:,}")
    if mine.has_text != other.has_text:
        lines.append("the texts are stored there" if other.has_text else "the texts are not stored there")
    for split in sorted(mine.splits.keys() | other.splits.keys()):
        if mine.splits.get(split) != other.splits.get(split):
            lines.append(f"the examples of '{split}' differ")
    changed = [path for path in mine.files.keys() & other.files.keys() if mine.files[path] != other.files[path]]
    if changed and not lines:
        lines.append(f"{counted(len(changed), 'file')} with other bytes, such as '{min(changed)}'")
    return lines or (
        ["the settings of the dump differ"] if mine.settings != other.settings or mine.task != other.task else []
    )


@dataclass(frozen=True)
class LocalCache:
    """A cache directory of this machine; if it cannot be read, ``problem`` says why and the rest is empty."""

    path: str
    identity: str = ""
    teachers: tuple[str, ...] = ()
    texts: int = 0
    bytes: int = 0  # of the whole cache
    bytes_here: int = 0  # of the selected files
    origin: str = ""  # name@number that it was pulled from
    problem: str = ""


def find_caches(places: Iterable[Path]) -> list[LocalCache]:
    """The caches among ``places``, which may or may not be directories, in their order."""
    return [_look(place) for place in places if _has_manifest(place)]


def _has_manifest(place: Path) -> bool:
    try:
        return (place / MANIFEST).is_file()
    except OSError:  # a directory that this user may not read, such as lost+found
        return False


def _look(place: Path) -> LocalCache:
    try:
        manifest = read_manifest(place)
        contents = manifest.contents
        local = local_selection(place, contents)
    except KdcacheError as error:
        return LocalCache(str(place), problem=error.message)
    here = contents.files.keys() if local is None else local.selection.covers(contents)
    return LocalCache(
        str(place),
        manifest.identity,
        tuple(contents.teachers),
        sum(part.texts for part in contents.parts),
        sum(digest.size for digest in contents.files.values()),
        sum(contents.files[path].size for path in here),
        "" if local is None else local.origin,
    )
