"""``kdcache evaluate``: scores of a saved model on a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcache.cli.options import Json, TrustRemoteCode
from kdcache.cli.output import out


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_DIR",
            help="Directory of a student, a co-finetuned teacher, or any sequence classifier.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="tsv, csv, jsonl or parquet file, or a hub data set name.", show_default=False
        ),
    ],
    text: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Text column; twice for pairs.", show_default=False)
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Label column.", show_default=False)] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Class 0 of the file's numbers, class 1 …; once per class.", show_default=False
        ),
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens at most.", show_default=False)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of 128 tokens in one forward pass.")] = 32,
    speed: Annotated[
        bool, typer.Option("--speed", help="Also time forward passes: ms per text, and texts per second in batches.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Score a model: accuracy, macro-F1, Matthews correlation, loss.

    A student of kdcache knows its text and label columns, a co-finetuned teacher its text columns; other models need
    --text and --label. If labels are
    numbers, and the student's class names were sorted and not declared by data.labels, --labels gives the class of each
    number.

    Example: kdcache evaluate runs/sst2/student --data data/test.tsv --json

    Example: kdcache evaluate runs/sst2/teachers/bert --data data/test.tsv --label label --speed
    """
    from kdcache.students.score import evaluate_model

    scores = evaluate_model(
        model,
        data,
        text=text,
        label=label,
        max_length=max_length,
        batch=batch,
        labels=labels,
        speed=speed,
        trust_remote_code=trust_remote_code,
    )
    out.document(scores)
    out.dict(scores)
