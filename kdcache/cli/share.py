"""``kdcache cache push|pull|ls|rm|gc|status``: caches of the team, on a remote."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from kdcache.cli.options import CachePath, Json, RemoteUrl, layer_numbers, open_team, require_directory
from kdcache.cli.output import out
from kdcache.progress import counted, format_bytes

if TYPE_CHECKING:
    from kdcache.cache.selection import Selection
    from kdcache.share.gc import GcReport
    from kdcache.share.listing import Name, Status
    from kdcache.share.push import PushReport
    from kdcache.share.refs import Ref
    from kdcache.share.stores.base import Remote

Reference = Annotated[
    str, typer.Argument(metavar="NAME", help="NAME, NAME@3, NAME@TAG or NAME@DIGEST on the remote.", show_default=False)
]
_SHOWN = 20  # keys that gc lists for people; all of them are in --json


class BareRemote(TyperCommand):
    """A command whose ``--remote`` may stand without a URL, as in 0.1.0: the remote of KDCACHE_REMOTE."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments with ``--remote=`` where no URL follows."""
        given = [
            "--remote=" if word == "--remote" and (after is None or after.startswith("-")) else word
            for word, after in itertools.zip_longest(args, args[1:])
        ]
        return super().parse_args(ctx, given)


def push(
    path: CachePath,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Its name on the remote.", show_default=False)],
    tag: Annotated[str | None, typer.Option("--tag", help="A tag for this version.", show_default=False)] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="Leave out the texts; ids and labels are sent.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
    remote: RemoteUrl = None,
    json: Json = False,  # noqa: ARG001
) -> None:
    """Publish a cache as the newest version of a name; only objects that the remote lacks are sent.

    The version becomes visible when it is complete. If interrupted, run the same command again: it continues.

    Example: kdcache cache push runs/sst2/cache --name sst2-3t --tag v2
    """
    require_directory(path)
    from kdcache.cache.memory import give_back_large_blocks
    from kdcache.progress import RichProgress
    from kdcache.share.push import push as publish

    give_back_large_blocks()
    store = open_team(remote)
    report = publish(store, path, name, tag=tag, with_text=not no_text, dry_run=dry_run, progress=RichProgress())
    out.document({**asdict(report), "remote": store.url})
    out.text(_pushed(report, store.url))


def _pushed(report: PushReport, url: str) -> str:
    kept = report.bytes - report.bytes_sent
    amount = f"{report.files_sent:,} of {counted(report.files, 'object')} ({format_bytes(report.bytes_sent)})"
    there = f"; {format_bytes(kept)} are there already" if kept else ""
    if report.dry_run:
        what = "would be made" if report.new_version else "is this cache already"
        return f"{report.reference} on {url} {what}: {amount} would be sent{there}"
    what = "is published" if report.new_version else "was this cache already"
    return f"{report.reference} on {url} {what}: {amount} sent{there}"


def pull(
    name: Reference,
    teachers: Annotated[
        str | None, typer.Option("--teachers", metavar="A,B", help="These teachers only.", show_default=False)
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="6,12", help="Hidden states of these layers only.", show_default=False),
    ] = None,
    no_hidden: Annotated[bool, typer.Option("--no-hidden", help="Logits only, no hidden states.")] = False,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Leave out the texts; ids and labels are fetched.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Target directory; default: NAME.", show_default=False)
    ] = None,
    remote: RemoteUrl = None,
    json: Json = False,  # noqa: ARG001
) -> None:
    """Fetch a cache, or a part of it, into a directory; every byte is verified.

    To complete a part, pull more into the same directory. If interrupted, run the same command again: it continues.

    Example: kdcache cache pull sst2-3t --teachers bert --no-hidden --to caches/sst2
    """
    from kdcache.progress import RichProgress
    from kdcache.share.keys import split_reference
    from kdcache.share.pull import pull as fetch
    from kdcache.share.refs import resolve

    target = to or Path(split_reference(name)[0])
    store = open_team(remote)
    ref = resolve(store, name)
    selection = _selection(store, ref, _words(teachers), layer_numbers(layers), hidden=not no_hidden, text=not no_text)
    report = fetch(store, f"{ref.name}@{ref.manifest}", target, selection, progress=RichProgress())
    out.document({**asdict(report), "remote": store.url})
    part = "" if report.selection is None else ", a part of it"
    amount = f"{counted(report.files_fetched, 'file')} ({format_bytes(report.bytes_fetched)}) fetched"
    kept = (
        f", {report.files_kept:,} ({format_bytes(report.bytes_kept)}) were there already" if report.files_kept else ""
    )
    out.text(f"{report.reference} is in {report.path}{part}: {amount}{kept}")


def _selection(
    remote: Remote, ref: Ref, teachers: list[str] | None, layers: Sequence[int] | None, *, hidden: bool, text: bool
) -> Selection | None:
    if teachers is None and layers is None and hidden and text:
        return None
    from kdcache.cache.selection import choose
    from kdcache.share.pull import fetch_manifest

    return choose(fetch_manifest(remote, ref).contents, teachers, layers, hidden=hidden, text=text)


def ls(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="All versions of this name on the remote.", show_default=False),
    ] = None,
    remote: Annotated[
        str | None,
        typer.Option(
            "--remote",
            metavar="[URL]",
            help="List the team's remote; without URL, that of KDCACHE_REMOTE.",
            show_default=False,
        ),
    ] = None,
    url: Annotated[str | None, typer.Option("--url", metavar="URL", hidden=True)] = None,
    json: Json = False,  # noqa: ARG001
) -> None:
    """List the caches of this machine (runs, working directory, fetched ones), or those of the remote.

    Example: kdcache cache ls --remote

    Example: kdcache cache ls --remote s3://team-bucket/kdcache

    Example: kdcache cache ls sst2-3t
    """
    if name is None and remote is None and url is None:
        _list_here()
        return
    from kdcache.share.keys import NAME, check_name
    from kdcache.share.listing import names

    if name is None and remote and NAME.fullmatch(remote) and not Path(remote).is_dir():
        name, remote = remote, ""  # ls --remote NAME, as in 0.1.0
    store = open_team(remote or url)
    listed = names(store, name and check_name(name))
    out.document({"remote": store.url, "names": [_name_document(entry) for entry in listed]})
    if not listed:
        out.note(f"{store.url} has no cache" + (f" '{name}'" if name else ""))
    rows = [row for entry in listed for row in _rows(entry, every=name is not None)]
    if rows:
        out.table(("name", "tag", "made", "size", "files", "versions", "identity"), rows)
    for entry in listed:
        if entry.problem:
            out.note(f"{entry.name}: {entry.problem}")


def _rows(name: Name, *, every: bool) -> list[tuple[Any, ...]]:
    """The newest version, or all of them, newest first."""
    shown = list(reversed(name.versions)) if every else list(name.versions[-1:])
    newest = " (fork)" if name.forked else ""
    return [
        (
            ref.pinned + (newest if ref.number == name.versions[-1].number else ""),
            ref.tag or "",
            ref.made,
            format_bytes(ref.size),
            ref.files,
            len(name.versions),
            ref.identity[:12],
        )
        for ref in shown
    ]


def _name_document(name: Name) -> dict[str, Any]:
    versions = [{**asdict(ref), "reference": ref.pinned} for ref in name.versions]
    return {"name": name.name, "forked": name.forked, "problem": name.problem, "versions": versions}


def _list_here() -> None:
    from kdcache.cli.options import RUNS
    from kdcache.runs import home
    from kdcache.share.listing import find_caches

    places = [*sorted(RUNS.glob("*/cache")), *sorted(Path().glob("*")), *sorted((home() / "store/caches").glob("*"))]
    caches = find_caches(places)
    out.document({"caches": [asdict(cache) for cache in caches]})
    if not caches:
        out.note("there is no cache in runs/, in this directory or in the store of fetched caches")
        return
    rows = [
        (
            cache.path,
            ", ".join(cache.teachers),
            cache.texts,
            format_bytes(cache.bytes_here)
            + (f" of {format_bytes(cache.bytes)}" if cache.bytes_here < cache.bytes else ""),
            cache.identity[:12],
            cache.problem or cache.origin,
        )
        for cache in caches
    ]
    out.table(("path", "teachers", "texts", "size", "identity", "from"), rows)


def rm(name: Reference, remote: RemoteUrl = None, json: Json = False) -> None:  # noqa: ARG001
    """Drop a name, or one version of it, from the remote. Its files stay until gc collects them.

    Example: kdcache cache rm sst2-3t@2
    """
    from kdcache.share.gc import remove

    store = open_team(remote)
    dropped = remove(store, name)
    out.document({"remote": store.url, "removed": [ref.pinned for ref in dropped]})
    out.text(f"removed from {store.url}: {', '.join(ref.pinned for ref in dropped)}")
    out.hint("Its files are kept for some days, and deleted by: kdcache cache gc --delete")


def gc(
    delete: Annotated[
        bool, typer.Option("--delete/--dry-run", help="Delete, or only show what would be deleted.")
    ] = False,
    grace: Annotated[
        float, typer.Option("--grace-days", min=0.0, help="Keep objects written or removed within so many days.")
    ] = 7.0,
    remote: RemoteUrl = None,
    json: Json = False,  # noqa: ARG001
) -> None:
    """Delete objects on the remote that no version reaches and that are older than a grace period.

    Example: kdcache cache gc
    """
    from kdcache.progress import RichProgress
    from kdcache.share.gc import collect

    store = open_team(remote)
    report = collect(store, grace=grace * 86_400, delete=delete, progress=RichProgress())
    out.document({**asdict(report), "remote": store.url})
    _show_collected(report, store.url)


def _show_collected(report: GcReport, url: str) -> None:
    for key in report.keys[:_SHOWN]:
        out.text(key)
    if len(report.keys) > _SHOWN:
        out.text(f"... and {len(report.keys) - _SHOWN:,} more; --json has all")
    what = "deleted from" if report.deleted else "would be deleted from"
    out.text(
        f"{what} {url}: {counted(report.files, 'file')}, {counted(report.manifests, 'manifest')}, "
        f"{counted(report.refs, 'ref')}, {format_bytes(report.bytes)}; "
        f"kept: {counted(report.kept_files, 'file')} in use ({format_bytes(report.kept_bytes)}), "
        f"{report.young_files:,} too young ({format_bytes(report.young_bytes)})"
    )
    if report.keys and not report.deleted:
        out.hint("Delete them with: kdcache cache gc --delete")


def status(path: CachePath, remote: RemoteUrl = None, json: Json = False) -> None:  # noqa: ARG001
    """Show whether a cache directory is pushed, under which names, and how their newest versions differ.

    Example: kdcache cache status runs/sst2/cache
    """
    require_directory(path)
    from kdcache.share.listing import status as compare

    store = open_team(remote)
    standing = compare(store, path)
    out.document({**asdict(standing), "remote": store.url})
    for line in _standing(standing, store.url):
        out.text(line)
    for name, problem in standing.problems.items():
        out.note(f"{name}: {problem}")
    for reference in standing.newest.values():
        if reference not in standing.pushed_as:
            out.hint(f"See row by row what differs with: kdcache cache diff {shlex.quote(str(path))} {reference}")


def _standing(standing: Status, url: str) -> list[str]:
    lines = [f"{standing.path}: identity {standing.identity[:12]}"]
    if standing.pushed_as:
        lines.append(f"pushed to {url} as {', '.join(standing.pushed_as)}")
    else:
        verb = "is" if standing.files_missing == 1 else "are"
        lack = (
            f"{counted(standing.files_missing, 'file')} ({format_bytes(standing.bytes_missing)}) of it {verb} not there"
        )
        lines.append(f"not pushed to {url}; {lack}")
    for name, reference in standing.newest.items():
        differences = standing.differences[name]
        if reference not in standing.pushed_as:
            lines.append(f"the newest version of '{name}' is {reference}: {'; '.join(differences) or 'the same data'}")
    if standing.not_pulled:
        lines.append(f"not pulled: {counted(standing.not_pulled, 'file')} ({format_bytes(standing.bytes_not_pulled)})")
    return lines


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]
