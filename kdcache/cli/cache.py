"""``kdcache cache info|verify``: what a cache holds, and whether it is undamaged."""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.cli.options import CacheReference, Json, RemoteUrl, find_version
from kdcache.cli.output import out
from kdcache.errors import KdcacheError, RecipeError
from kdcache.progress import counted, format_bytes, listed

if TYPE_CHECKING:
    from kdcache.cache.verify import Damage
    from kdcache.share.refs import Ref
    from kdcache.share.stores.base import Remote


def info(cache: CacheReference, remote: RemoteUrl = None, json: Json = False) -> None:  # noqa: ARG001
    """Show the contents of a cache: texts, teachers, layers, bytes, origin.

    Example: kdcache cache info runs/sst2/cache

    Example: kdcache cache info sst2-3t@v2
    """
    from kdcache.cache.card import describe
    from kdcache.cache.reader import open_cache

    if Path(cache).is_dir():
        description = describe(open_cache(cache, incomplete=True))
    else:
        description = _describe_remote(*find_version(cache, remote))
    out.document(description)
    _show(description)


def verify(
    cache: CacheReference,
    read_data: Annotated[bool, typer.Option("--read-data", help="On a remote: read every byte.")] = False,
    subset: Annotated[
        str | None,
        typer.Option("--subset", metavar="10%", help="On a remote: read a share of the files.", show_default=False),
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option("--seed", help="Which files are in the subset; by default others every time.", show_default=False),
    ] = None,
    remote: RemoteUrl = None,
    json: Json = False,  # noqa: ARG001
) -> None:
    """Compare a cache with its manifest; exit code 3 if something is missing or damaged.

    In a directory every byte is read. On a remote, presence and size of every file are checked, and with --read-data or
    --subset the bytes too.

    Example: kdcache cache verify runs/sst2/cache

    Example: kdcache cache verify sst2-3t --subset 10%
    """
    if Path(cache).is_dir():
        _verify_directory(Path(cache))
        return
    share = 1.0 if read_data else _share(subset)
    _verify_remote(*find_version(cache, remote), share, seed or secrets.token_hex(4))


def _verify_directory(path: Path) -> None:
    from kdcache.cache.verify import to_come, unreferenced
    from kdcache.cache.verify import verify as check
    from kdcache.progress import RichProgress

    progress = RichProgress()
    progress.start("verify", _size(path), "bytes")
    damages = check(path, on_bytes=lambda count: progress.advance(count, bytes_done=count))
    progress.finish()
    readable = not any(damage.file in ("manifest.json", ".selection.json") for damage in damages)
    strays, coming = (unreferenced(path), to_come(path)) if readable else ([], [])
    document = {
        "path": str(path),
        "damaged": [vars(damage) for damage in damages],
        "to_come": coming,
        "unreferenced": strays,
    }
    out.document(document)
    for stray in strays:
        out.note(f"not part of the cache: {stray}")
    _refuse_damage(
        damages,
        f"cache '{path}'",
        "file",
        f"Dump again only what is damaged: kdcache dump-teachers RECIPE --repair; or, if it was pulled, pull it again: "
        f"kdcache cache pull NAME --to {shlex.quote(str(path))}",
    )
    if coming:
        out.text(
            f"{path}: not complete: {len(coming):,} selected files were not fetched yet; those that are here are whole"
        )
        return
    part = "every selected file" if (path / ".selection.json").exists() else "every file"
    out.text(f"{path}: {part} is what the manifest says")


def _describe_remote(remote: Remote, ref: Ref) -> dict[str, Any]:
    from kdcache.cache.card import describe
    from kdcache.cache.reader import Cache
    from kdcache.share.pull import fetch_manifest

    description = describe(Cache(Path(ref.pinned), fetch_manifest(remote, ref)))
    del description["path"]
    return {"reference": ref.pinned, "remote": remote.url, "tag": ref.tag or "", "made": ref.made, **description}


def _verify_remote(remote: Remote, ref: Ref, share: float, seed: str) -> None:
    from kdcache.progress import RichProgress
    from kdcache.share.remote_verify import verify_remote

    damages = verify_remote(remote, ref, share=share, seed=seed, progress=RichProgress())
    damaged = [vars(damage) for damage in damages]
    out.document({"reference": ref.pinned, "remote": remote.url, "share_read": share, "seed": seed, "damaged": damaged})
    _refuse_damage(
        damages,
        f"{ref.pinned} on {remote.url}",
        "object",
        "Delete what is damaged there, and push the cache again from a whole copy: only that is sent.",
    )
    read = {0.0: "presence and sizes are right", 1.0: "every byte is right"}.get(
        share, f"presence and sizes are right, and the bytes of {share:.0%} of the files (--seed {seed})"
    )
    out.text(f"{ref.pinned} on {remote.url}: {read}")


def _refuse_damage(damages: Sequence[Damage], subject: str, noun: str, hint: str) -> None:
    """Print the damages, if there are any, and leave with exit code 3."""
    for damage in damages:
        out.text(f"{damage.file}: {damage.reason}")
    if damages:
        out.error(f"{subject} has {counted(len(damages), f'damaged {noun}')}", hint)
        raise typer.Exit(3)


def _share(subset: str | None) -> float:
    if subset is None:
        return 0.0
    number = subset.removesuffix("%")
    try:
        share = float(number) / (100 if subset.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise RecipeError(f"--subset is '{subset}', not a share of the files", "Such as: --subset 10%")
    return share


def _size(path: Path) -> int:
    """Bytes that a verification will read; 0 if the manifest is unreadable, which the verification reports."""
    from kdcache.cache.reader import open_cache

    try:
        cache = open_cache(path, incomplete=True)
        files = cache.manifest.contents.files
        names = files if cache.local is None else cache.local.selection.covers(cache.manifest.contents)
        return sum(files[name].size for name in names)
    except KdcacheError:
        return 0


def _show(description: dict[str, Any]) -> None:
    """For humans: the facts, then a line for each teacher and each of its layers."""
    from kdcache.cache.card import folds_lines, stored_as
    from kdcache.cache.spec import IMPORTED

    apart = ("teachers", "provenance", "examples", "bytes", "selection")
    examples = ", ".join(f"{split} {count:,}" for split, count in description["examples"].items())
    out.dict(
        {key: value for key, value in description.items() if key not in apart}
        | {
            "examples": examples,
            "label_names": listed(description["label_names"]),
            "bytes": format_bytes(description["bytes"]),
            "command": _shortened(str(description["provenance"].get("command", ""))),
        }
        | _part(description["selection"])
    )
    rows: list[tuple[Any, ...]] = []
    for name, teacher in description["teachers"].items():
        run = f"{teacher['backend']} {teacher['precision']}"
        what = f"{teacher['head']} head, {teacher['depth']} x {teacher['width']}, {run}"
        if teacher["backend"] == IMPORTED:
            what = f"{run}, from a file"
        rows.append((name, what, teacher["tokens"], format_bytes(teacher["bytes"]), _here(teacher)))
        for layer, stored in teacher["layers"].items():
            rows.append(("", f"layer {layer}: {stored_as(stored)}", None, format_bytes(stored["bytes"]), _here(stored)))
    out.text()
    columns = ("teacher", "what", "tokens", "size", "here")
    shown = 4 if description["selection"] is None else 5
    out.table(columns[:shown], [row[:shown] for row in rows])
    for line in folds_lines(description):
        out.text(line)


def _shortened(command: str) -> str:
    """A command without the folders of the machine that it ran on; ``--json`` has it as it was."""
    return re.sub(r"(?<![\w.:/~-])/(?:[^/\s'\"]+/)+(?=[^/\s'\"])", "…/", command)


def _here(stored: dict[str, Any]) -> str:
    return "yes" if stored["here"] else "no"


def _part(selection: dict[str, Any] | None) -> dict[str, str]:
    """Entries of ``info`` for a cache of which only a part is here."""
    if selection is None:
        return {}
    here = f"{format_bytes(selection['bytes_here'])}; not pulled: {format_bytes(selection['bytes_not_selected'])}"
    coming = "" if selection["complete"] else f"; still to be fetched: {format_bytes(selection['bytes_absent'])}"
    return {
        "here": here + coming,
        "text_here": str(selection["text"]),
        "pulled_from": selection["origin"] or "not known",
    }
