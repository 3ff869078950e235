"""``kdcache cofinetune``: train the teachers together under one shared head."""

from __future__ import annotations

from typing import Annotated

import typer

from kdcache.cli import stages
from kdcache.cli.options import RUNS, Json, OutputDir, RecipeFile, Settings, open_job
from kdcache.cli.output import out


def cofinetune(
    recipe: RecipeFile,
    add: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Train only this new teacher, against the frozen shared head.", show_default=False
        ),
    ] = None,
    settings: Settings = None,
    output_dir: OutputDir = RUNS,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Train the teachers together on the task, sharing one pooling and one prediction layer.

    If interrupted, run the same command again: it continues.

    Example: kdcache cofinetune sst2.toml --set cofinetune.epochs=2

    Example: kdcache cofinetune sst2.toml --add electra
    """
    from kdcache.report.table import learned_nothing

    job = open_job(recipe, settings, output_dir)
    result = stages.cofinetune(job, add=add)
    out.document({"teachers_dir": str(result.teachers_dir), "scores": result.scores, "mean_scores": result.mean_scores})
    columns = ("accuracy", "macro_f1", "matthews", "loss")
    rows = [(name, *(scores.get(column) for column in columns)) for name, scores in result.scores.items()]
    mean = [("their mean", *(result.mean_scores.get(column) for column in columns))] if result.mean_scores else []
    out.table(("teacher", *columns), [*rows, *mean])
    for name in (name for name, scores in result.scores.items() if learned_nothing(scores, 0)):
        out.note(
            f"teacher '{name}' learned nothing: its Matthews correlation on validation is "
            f"{result.scores[name]['matthews']:.3f}, "
            "no more than that of one answer for every row"
        )
    out.hint(f"Run each once over the data: kdcache dump-teachers {recipe}")
