"""``kdcache cache``: what a cache holds, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcache.cli.options import Json
from kdcache.cli.output import out

CachePath = Annotated[Path, typer.Argument(metavar="PATH", help="Directory of a cache.", show_default=False)]


def info(path: CachePath, json: Json = False) -> None:  # noqa: ARG001
    """Show what a cache holds: texts, teachers, layers, bytes, where it came from.

    Example: kdcache cache info runs/sst2/cache
    """
    from kdcache.cache.describe import describe
    from kdcache.cache.reader import open_cache

    description = describe(open_cache(path))
    out.document(description)
    out.dict(description)


def verify(path: CachePath, json: Json = False) -> None:  # noqa: ARG001
    """Read every byte of a cache and compare it with the manifest; exit code 3 where something is damaged.

    Example: kdcache cache verify runs/sst2/cache
    """
    from kdcache.cache.verify import verify as check

    damages = check(path)
    out.document({"path": str(path), "damaged": [{"file": damage.file, "reason": damage.reason} for damage in damages]})
    for damage in damages:
        out.text(f"{damage.file}: {damage.reason}")
    if damages:
        out.error(
            f"cache '{path}' has {len(damages)} damaged files",
            "Dump again only what is damaged: kdcache dump-teachers RECIPE --repair",
        )
        raise typer.Exit(3)
    out.text(f"{path}: every file is what the manifest says")
