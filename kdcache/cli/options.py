"""Arguments and flags that several commands share, and what they make: a recipe and its run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.cli.output import out

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe
    from kdcache.runs import RunDirectory
    from kdcache.share.reading_through import RemoteCache


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
    typer.Option(metavar="DIR", help="Teachers directory; that of the run where not given.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", callback=_json_mode, help="Print the result as JSON.")]
RemoteUrl = Annotated[
    str | None,
    typer.Option("--remote", metavar="URL", help="The team's remote; by default KDCACHE_REMOTE.", show_default=False),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
RUNS = Path("runs")


@dataclass(frozen=True)
class Job:
    """A recipe with the directory of its run; ``teachers`` and ``cache`` lie in it unless flags say otherwise."""

    recipe: Recipe
    run: RunDirectory
    teachers: Path
    cache: Path
    progress: Progress
    remote_cache: RemoteCache | None = None  # in the place of ``cache``: read through from a remote


def open_job(
    recipe: Path,
    settings: list[str] | None,
    output_dir: Path,
    *,
    teachers: Path | None = None,
    cache: Path | RemoteCache | None = None,
) -> Job:
    """Read the recipe and say where its run lies; nothing is written."""
    from kdcache.progress import RichProgress
    from kdcache.recipe import load_recipe
    from kdcache.runs import RunDirectory

    loaded = load_recipe(recipe, settings)
    run = RunDirectory(output_dir / loaded.name)
    through = None if cache is None or isinstance(cache, Path) else cache
    place = cache if isinstance(cache, Path) else run.cache
    return Job(loaded, run, teachers or run.teachers, place, RichProgress(), through)
