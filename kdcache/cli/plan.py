"""``kdcache plan``: what to store of the teachers, measured before anything is dumped."""

from __future__ import annotations

import json as jsons
import re
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.cli.options import RUNS, Json, OutputDir, RecipeFile, Settings, TeachersDir, open_job
from kdcache.cli.output import out
from kdcache.errors import KdcacheError, RecipeError
from kdcache.progress import format_bytes

if TYPE_CHECKING:
    from kdcache.dump.plan import StoragePlan

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def plan(
    recipe: RecipeFile,
    settings: Settings = None,
    output_dir: OutputDir = RUNS,
    teachers: TeachersDir = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes of the whole cache, such as 2GB or 500MiB.", show_default=False),
    ] = None,
    texts: Annotated[
        int, typer.Option(min=1, help="Texts that fidelity is measured on; none of them is fitted on.")
    ] = 256,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Run each teacher over a sample, measure size and fidelity of the storage formats per layer, recommend one.

    kept: share of the variance of the hidden states. cosine, error: of the reconstructed states; the error is relative.
    KL: of the soft labels that the teacher's pooling and head compute from the reconstructed last layer. All on
    held-out texts. kdcache report shows the plot.

    Example: kdcache plan sst2.toml --budget 2GB
    """
    limit = None if budget is None else size_of(budget)
    job = open_job(recipe, settings, output_dir, teachers=teachers)
    from kdcache.dump.plan import plan_storage
    from kdcache.files import replace_file

    made = plan_storage(job.recipe, job.teachers, budget=limit, unseen=texts, progress=job.progress)
    job.run.create()
    replace_file(job.run.plan, (jsons.dumps(made.as_dict(), indent=1) + "\n").encode())
    out.document(made.as_dict())
    _show(made)
    if made.recommendation is None:
        least = made.fixed + sum(min(layer.bytes) for layer in made.layers)
        raise KdcacheError(
            f"nothing fits into {format_bytes(limit or 0)}: the smallest formats of these layers take "
            f"{format_bytes(least)}",
            'Give a larger --budget, or store fewer layers (dump.layers), one row per text (dump.tokens = "first"), or '
            "logits alone.",
        )


def size_of(text: str) -> int:
    """Bytes of ``2GB``, ``500 MiB``, ``1e9``; RecipeError if it is not a size."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?)\s*([kmgt]i?|)b?\s*", text.lower())
    if match is None or float(match[1]) <= 0:
        raise RecipeError(f"--budget is '{text}'; a size was expected", "Write it as 2GB, 500MB or 1.5GiB.")
    return int(float(match[1]) * _UNITS[match[2]])


def _show(made: StoragePlan) -> None:
    for line in made.lines():
        out.text(line)
    chosen = {} if made.recommendation is None else made.recommendation.formats
    rows = []
    for layer in made.layers:
        for place, (form, size) in enumerate(zip(layer.formats, layer.bytes, strict=True)):
            mark = "recommended" if chosen.get((layer.teacher, layer.layer)) == form else ""
            mark += (", " if mark else "") + "recipe" if place == layer.asked else ""
            numbers = [
                form.row_bytes,
                format_bytes(size),
                round(form.explained, 4),
                round(form.cosine, 4),
                round(form.relative_error, 4),
            ]
            rows.append(
                [layer.teacher, layer.layer, form.form, *numbers, "" if form.kl is None else f"{form.kl:.5f}", mark]
            )
    out.text()
    out.table(["teacher", "layer", "form", "bytes/row", "total", "kept", "cosine", "error", "KL", ""], rows)
    if made.recommendation is not None:
        recommended = made.recommendation
        out.text()
        out.text(
            f"recommended: {format_bytes(recommended.bytes)} in all, {recommended.explained:.4f} of the variance kept "
            "(mean over layers)"
        )
        for line in recommended.toml():
            out.text(f"    {line}")
