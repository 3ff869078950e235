"""``kdcache cache``: what a cache holds, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdcache.cli.options import Json
from kdcache.cli.output import out
from kdcache.errors import KdcacheError, RecipeError
from kdcache.progress import format_bytes

CachePath = Annotated[Path, typer.Argument(metavar="PATH", help="Directory of a cache.", show_default=False)]


def info(path: CachePath, json: Json = False) -> None:  # noqa: ARG001
    """Show what a cache holds: texts, teachers, layers, bytes, where it came from.

    Example: kdcache cache info runs/sst2/cache
    """
    _require_directory(path)
    from kdcache.cache.describe import describe
    from kdcache.cache.reader import open_cache

    description = describe(open_cache(path))
    out.document(description)
    _show(description)


def verify(path: CachePath, json: Json = False) -> None:  # noqa: ARG001
    """Read every byte of a cache and compare it with the manifest; exit code 3 where something is damaged.

    Example: kdcache cache verify runs/sst2/cache
    """
    _require_directory(path)
    from kdcache.cache.verify import unreferenced
    from kdcache.cache.verify import verify as check
    from kdcache.progress import RichProgress

    progress = RichProgress()
    progress.start("verify", _size(path), "bytes")
    damages = check(path, on_bytes=lambda count: progress.advance(count, bytes_done=count))
    progress.finish()
    strays = [] if any(damage.file == "manifest.json" for damage in damages) else unreferenced(path)
    out.document({"path": str(path), "damaged": [vars(damage) for damage in damages], "unreferenced": strays})
    for damage in damages:
        out.text(f"{damage.file}: {damage.reason}")
    for stray in strays:
        out.note(f"not part of the cache: {stray}")
    if damages:
        count = "1 damaged file" if len(damages) == 1 else f"{len(damages)} damaged files"
        out.error(f"cache '{path}' has {count}", "Dump again only what is damaged: kdcache dump-teachers RECIPE --repair")
        raise typer.Exit(3)
    out.text(f"{path}: every file is what the manifest says")


def _require_directory(path: Path) -> None:
    if not path.is_dir():
        raise RecipeError(f"there is no directory '{path}'", "Name the directory of a cache: runs/NAME/cache.")


def _size(path: Path) -> int:
    """Bytes that a verification will read, as far as the manifest can be read; the verification itself says what is wrong with it."""
    from kdcache.cache.reader import open_cache

    try:
        return sum(digest.size for digest in open_cache(path).manifest.contents.files.values())
    except KdcacheError:
        return 0


def _show(description: dict[str, Any]) -> None:
    """For humans: the facts, then a line for each teacher and each of its layers."""
    apart = ("teachers", "provenance", "examples", "bytes")
    examples = ", ".join(f"{split} {count:,}" for split, count in description["examples"].items())
    out.dict(
        {key: value for key, value in description.items() if key not in apart}
        | {
            "examples": examples,
            "bytes": format_bytes(description["bytes"]),
            "command": description["provenance"].get("command", ""),
        }
    )
    rows: list[tuple[Any, ...]] = []
    for name, teacher in description["teachers"].items():
        what = f"{teacher['head']} head, {teacher['depth']} x {teacher['width']}, {teacher['backend']} {teacher['precision']}"
        rows.append((name, what, teacher["tokens"], format_bytes(teacher["bytes"])))
        for layer, stored in teacher["layers"].items():
            rows.append(
                (
                    "",
                    f"layer {layer}: {stored['projection']} {stored['dim']} {stored['dtype']}",
                    None,
                    format_bytes(stored["bytes"]),
                )
            )
    out.text()
    out.table(("teacher", "what", "tokens", "size"), rows)
