"""``kdcache cofinetune``: train the teachers together under one shared head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.cli import stages
from kdcache.cli.options import RUNS, Json, OutputDir, RecipeFile, Settings, open_job
from kdcache.cli.output import out

if TYPE_CHECKING:
    from kdcache.teachers.cofinetune import CofinetuneResult


def cofinetune(
    recipe: RecipeFile,
    add: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Train only this new teacher, against the frozen shared head.", show_default=False
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=2,
            max=100,
            help="Train K further bundles, for out-of-fold logits of train texts.",
            show_default=False,
        ),
    ] = None,
    settings: Settings = None,
    output_dir: OutputDir = RUNS,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Train the teachers together on the task, sharing one pooling and one prediction layer.

    If interrupted, run the same command again: it continues. Start it with torchrun to train in several processes. With
    cofinetune.placement=teacher, each of them holds its own teachers.

    With --folds K, the train rows are divided into K folds, and K further bundles are trained, each without one fold.
    The dump then takes the logits of a train text from the bundle that did not see it.

    Example: kdcache cofinetune sst2.toml --set cofinetune.epochs=2

    Example: torchrun --nproc-per-node 4 -m kdcache cofinetune sst2.toml

    Example: torchrun --nproc-per-node 3 -m kdcache cofinetune sst2.toml --set cofinetune.placement=teacher

    Example: kdcache cofinetune sst2.toml --folds 5

    Example: kdcache cofinetune sst2.toml --add electra
    """
    from kdcache.report.table import learned_nothing

    stages.join_processes()
    if folds is not None:
        settings = [*(settings or ()), f"cofinetune.folds={folds}"]
    job = open_job(recipe, settings, output_dir)
    result = stages.cofinetune(job, add=add)
    out.document(
        {
            "teachers_dir": str(result.teachers_dir),
            "scores": result.scores,
            "mean_scores": result.mean_scores,
            "epochs": result.epochs,
        }
        | ({"folds": result.folds} if result.folds else {})
    )
    columns = ("accuracy", "macro_f1", "matthews", "loss")
    rows = [(name, *(scores.get(column) for column in columns)) for name, scores in result.scores.items()]
    mean = [("their mean", *(result.mean_scores.get(column) for column in columns))] if result.mean_scores else []
    out.table(("teacher", *columns), [*rows, *mean])
    if result.folds:
        out.text()
        _show_folds(result.folds)
    for name in (name for name, scores in result.scores.items() if learned_nothing(scores, 0)):
        out.note(
            f"teacher '{name}' learned nothing: its Matthews correlation on validation is "
            f"{result.scores[name]['matthews']:.3f}, "
            "no more than that of one answer for every row"
        )
    for line in () if result.reused else _better_epochs(result, job.recipe.cofinetune.select_by, add):
        out.note(line)
    out.hint(f"Run each once over the data: kdcache dump-teachers {recipe}")


def _show_folds(folds: Mapping[str, Any]) -> None:
    """How far the teachers have learned their train rows by heart."""
    header = ("teacher", "train accuracy", "NLL", "out of fold: accuracy", "NLL")
    rows = []
    for name, teacher in folds["teachers"].items():
        seen, unseen = teacher["scores"]["in_fold"], teacher["scores"]["out_of_fold"]
        rows.append((name, *(scores[key] for scores in (seen, unseen) for key in ("accuracy", "loss"))))
    out.text(f"{folds['count']} folds, scores on the {folds['rows']:,} labelled train rows:")
    out.table(header, rows)


def _better_epochs(result: CofinetuneResult, select_by: str, added: str | None) -> Iterator[str]:
    """A line for each trained teacher that scored better after another epoch than the one that is kept."""
    sign = -1 if select_by == "loss" else 1
    for name in [added] if added else result.epochs:
        by_epoch = {scores["epoch"]: scores.get(select_by) for scores in result.epochs.get(name, ())}
        known = {epoch: score for epoch, score in by_epoch.items() if score is not None}
        kept = known.get(result.best_epoch or 0)
        best = max(known, key=lambda epoch: sign * known[epoch], default=0)
        if kept is not None and sign * known[best] > sign * kept:
            yield (
                f"teacher '{name}' scored best after epoch {best}: {select_by} {known[best]:.4f}. Epoch "
                f"{result.best_epoch} is kept for all teachers, with {kept:.4f}. A learning_rate of its own in "
                "[[teachers]] may help"
            )
