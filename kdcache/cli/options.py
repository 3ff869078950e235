"""Arguments and flags that several commands share, and what they stand for: a run, a cache, a remote."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.cli.output import out
from kdcache.errors import RecipeError
from kdcache.share import keys as layout

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe
    from kdcache.runs import RunDirectory
    from kdcache.share.reading_through import RemoteCache
    from kdcache.share.refs import Ref
    from kdcache.share.stores.base import Remote


def _json_mode(value: bool) -> bool:
    out.json = value
    return value


RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Pipeline file (TOML); see: kdcache pipelines ls", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. distill.seed=1. Repeatable.", show_default=False
    ),
]
OutputDir = Annotated[
    Path, typer.Option("--output-dir", metavar="DIR", help="Where the run directory <name>/ is made.")
]
TeachersDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Teachers directory; default: that of the run.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", callback=_json_mode, help="Print the result as JSON.")]
RemoteUrl = Annotated[
    str | None,
    typer.Option("--remote", metavar="URL", help="The team's remote; by default KDCACHE_REMOTE.", show_default=False),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
CachePath = Annotated[Path, typer.Argument(metavar="PATH", help="Directory of a cache.", show_default=False)]
CacheReference = Annotated[
    str,
    typer.Argument(
        metavar="PATH|NAME", help="Directory of a cache, or a name (NAME@VERSION) on the remote.", show_default=False
    ),
]
TargetsCache = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|NAME",
        help="Cache with the targets: a directory, or a name on the remote; default: that of the run.",
        show_default=False,
    ),
]
RUNS = Path("runs")
_REFERENCE = re.compile(rf"{layout.NAME.pattern}(@{layout.TAG.pattern})?")


@dataclass(frozen=True)
class Job:
    """A recipe and its run directory; ``teachers`` and ``cache`` are in it unless flags name others."""

    recipe: Recipe
    run: RunDirectory
    teachers: Path
    cache: Path
    progress: Progress
    remote_cache: RemoteCache | None = None  # read through from a remote, instead of ``cache``


def open_job(
    recipe: Path,
    settings: list[str] | None,
    output_dir: Path,
    *,
    teachers: Path | None = None,
    cache: Path | RemoteCache | None = None,
) -> Job:
    """Read the recipe and find its run directory; writes nothing."""
    from kdcache.progress import RichProgress, SilentProgress
    from kdcache.recipe import load_recipe
    from kdcache.runs import RunDirectory

    loaded = load_recipe(recipe, settings)
    run = RunDirectory(output_dir / loaded.name)
    through = None if cache is None or isinstance(cache, Path) else cache
    place = cache if isinstance(cache, Path) else run.cache
    return Job(loaded, run, teachers or run.teachers, place, SilentProgress() if out.quiet else RichProgress(), through)


def layer_numbers(text: str | None) -> tuple[int, ...] | None:
    """The layers of ``--layers 6,12``, ascending; None if the flag is not given. Raises RecipeError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 5 for part in parts):
        raise RecipeError(f"--layers is '{text}', not a list of layer numbers", "Such as: --layers 6,12")
    return tuple(sorted({int(part) for part in parts}))


def find_cache(reference: str, url: str | None = None) -> Path | RemoteCache:
    """The cache directory ``reference``, else that version on the remote at ``url`` or KDCACHE_REMOTE.

    Raises RecipeError (neither, or no remote is named), MismatchError (the remote has no such version).
    """
    path = Path(reference)
    if path.is_dir():
        return path
    from kdcache.share.reading_through import RemoteCache

    return RemoteCache(*find_version(reference, url))


def find_version(reference: str, url: str | None = None) -> tuple[Remote, Ref]:
    """The version that a reference means on the remote at ``url`` or KDCACHE_REMOTE. Raises as ``find_cache``."""
    if not _REFERENCE.fullmatch(reference):
        raise RecipeError(
            f"there is no directory '{reference}'", "Name a directory that holds a cache, or a cache on KDCACHE_REMOTE."
        )
    if not url and not os.environ.get("KDCACHE_REMOTE", "").strip():
        raise RecipeError(
            f"there is no directory '{reference}', and KDCACHE_REMOTE is not set to look for a cache of that name",
            "Name the directory of a cache, or the team's remote: export KDCACHE_REMOTE=s3://BUCKET/PREFIX",
        )
    from kdcache.share.refs import resolve

    remote = open_team(url)
    return remote, resolve(remote, reference)


def is_published(reference: str) -> bool:
    """Whether KDCACHE_REMOTE is set and has a version that ``reference`` means. Raises as ``find_version``."""
    if not default_url() or not _REFERENCE.fullmatch(reference):
        return False
    from kdcache.share.refs import names_of, resolve

    remote, name = open_team(), layout.split_reference(reference)[0]
    return name in names_of(remote, layout.refs_of(name)) and bool(resolve(remote, reference))


def check_teacher_name(name: str) -> None:
    """Raises RecipeError if a cache cannot have a teacher of that name."""
    from kdcache.cache.layout import TEACHER_NAME

    if not TEACHER_NAME.fullmatch(name):
        raise RecipeError(
            f"'{name}' is no name of a teacher: letters, digits, '.', '_' and '-', at most 64",
            "Choose a name such as: deberta",
        )


def open_team(url: str | None = None) -> Remote:
    """The remote at ``url``, else at KDCACHE_REMOTE. Raises RecipeError if neither names one."""
    from kdcache.share.stores.registry import default_remote, open_remote

    return open_remote(url) if url else default_remote()


def default_url() -> str:
    """The URL of the team's remote, as processes on other machines open it."""
    return os.environ.get("KDCACHE_REMOTE", "").strip()


def require_directory(path: Path) -> None:
    """Raises RecipeError if there is no directory ``path``."""
    if not path.is_dir():
        raise RecipeError(f"there is no directory '{path}'", "Name the directory of a cache: runs/NAME/cache.")
