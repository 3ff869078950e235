"""``kdcache audit``: compare live teachers with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.cli.options import Json, TrustRemoteCode
from kdcache.cli.output import out

if TYPE_CHECKING:
    from kdcache.dump.audit import AuditReport


def audit(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="Directory of a cache.", show_default=False)],
    teachers: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Teachers directory; default: the one beside the cache.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Texts to run the teachers on.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Which texts these are.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Run the teachers again on some texts of a cache and compare: weights, token spans, logits, every stored layer.

    Exit code 3, and the rows, where something differs by more than padding, quantisation and projection explain. What
    padding changes is measured on the spot. Whether the files are as they were written is another question: kdcache
    cache verify.

    Example: kdcache audit runs/sst2/cache --teachers runs/sst2/teachers --rows 512
    """
    from kdcache.cache.reader import open_cache
    from kdcache.dump.audit import audit as compare
    from kdcache.progress import RichProgress

    report = compare(
        open_cache(cache),
        teachers or cache.absolute().parent / "teachers",
        rows=rows,
        seed=seed,
        trust_remote_code=trust_remote_code,
        progress=RichProgress(),
    )
    out.document(report.as_dict())
    _show(report)
    if report.findings:
        where = ", ".join(dict.fromkeys(f"{finding.teacher}: {finding.component}" for finding in report.findings))
        out.error(
            f"cache '{cache}' does not match the outputs of these teachers ({where})",
            "Audit with the teachers that it was dumped from, or dump again into a new directory.",
        )
        raise typer.Exit(3)


def _show(report: AuditReport) -> None:
    table = [
        [teacher.teacher, component, teacher.texts, worst, "differs" if worst > 1 else "agrees"]
        for teacher in report.teachers
        for component, worst in teacher.worst.items()
    ]
    out.table(["teacher", "component", "texts", "worst error / allowed", ""], table)
    for finding in report.findings:
        out.text(f"{finding.teacher}, {finding.component}: {finding.message}")
        for row in finding.rows:
            times = "" if row.times_allowed is None else f", {row.times_allowed:g} times what is allowed"
            out.text(f"    text {row.text_id} ({row.part}, row {row.row}){times}")
    for name in report.not_audited:
        out.note(f"teacher '{name}' of the cache is not there and was not audited")
