"""``kdcache remote``: the place where a team keeps its caches."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kdcache.cli.options import Json, RemoteUrl, open_team
from kdcache.cli.output import out
from kdcache.errors import RecipeError

PlaceToCheck = Annotated[
    str | None,
    typer.Argument(
        metavar="[URL]",
        help="A directory, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX; by default KDCACHE_REMOTE.",
        show_default=False,
    ),
]
_ANSWERS = {True: "yes", False: "no", None: "-"}


def check(url: PlaceToCheck = None, remote: RemoteUrl = None, json: Json = False) -> None:  # noqa: ARG001
    """Try what a store guarantees and what it does not; exit code 1 if it cannot be used.

    Writes a few small objects under probes/ and removes them.

    Example: kdcache remote check s3://team-bucket/kdcache
    """
    from kdcache.share.stores.probe import check as probe
    from kdcache.share.stores.registry import open_remote

    if url is not None and remote is not None:
        raise RecipeError(f"two remotes are given: '{url}' and '{remote}'", "Name one of them.")
    report = probe(open_remote(url) if url is not None else open_team(remote))
    document: dict[str, Any] = {
        "url": report.where,
        "usable": report.usable,
        "writable": report.writable,
        "clock_ahead_seconds": report.ahead,
        "guarantees": [vars(finding) for finding in report.findings],
        "verdict": report.verdict,
    }
    out.document(document)
    out.text(report.where)
    out.text()
    out.table(
        ["guarantee", "holds", "what was found"],
        [[finding.name, _ANSWERS[finding.holds], finding.meaning] for finding in report.findings],
    )
    out.text()
    for key in report.leftovers:
        out.note(f"could not be removed: {key}")
    if not report.usable:
        out.error(
            report.verdict,
            "Choose another place for the team's caches: a shared directory, or a store that passes this check.",
        )
        raise typer.Exit(1)
    out.text(report.verdict)
