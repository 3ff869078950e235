"""``kdcache cache diff``: what differs between two caches."""

from __future__ import annotations

import contextlib
from pathlib import Path

import typer

from kdcache.cli.options import CacheReference, Json, RemoteUrl, find_cache
from kdcache.cli.output import out


def diff(first: CacheReference, second: CacheReference, remote: RemoteUrl = None, json: Json = False) -> None:  # noqa: ARG001
    """Say what differs between two caches: texts, splits, labels, teachers, layers, settings, bytes; exit code 3 where
    anything does.

    Of a name, text ids and examples are fetched, and nothing else.

    Example: kdcache cache diff runs/sst2/cache sst2-3t@v2

    Example: kdcache cache diff sst2-3t@1 sst2-3t@2 --json
    """
    from kdcache.cache.diff import diff as compare
    from kdcache.cache.reader import Cache, open_cache
    from kdcache.progress import SilentProgress

    with contextlib.ExitStack() as stack:

        def opened(reference: str) -> Cache:
            place = find_cache(reference, remote)
            if isinstance(place, Path):
                return open_cache(place, incomplete=True)
            return stack.enter_context(place.read(SilentProgress()))

        difference = compare(opened(first), opened(second))
    out.document({"same": difference.same, **difference.facts})
    for line in [] if difference.same else difference.lines():
        out.text(line)
    if not difference.same:
        raise typer.Exit(3)
    out.text("the same cache: equal identities, equal bytes in every data file")
