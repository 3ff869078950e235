"""``kdcache export``: a student as ONNX, compared with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcache.cli.options import Json, TrustRemoteCode
from kdcache.cli.output import out
from kdcache.errors import RecipeError


def export(
    student: Annotated[
        Path,
        typer.Argument(
            metavar="STUDENT",
            help="A run, a student of a sweep, or the directory of a student or any sequence classifier.",
            show_default=False,
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="onnx", help="The format.")] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Also write model_quantized.onnx, with weights in int8.")
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory to write; default: onnx/ in the run.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Rows to compare on; default: the run's validation rows, else synthetic token ids.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Text column of --data; twice for pairs.", show_default=False),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Label column of --data.", show_default=False)
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest accepted difference of a logit, as a share of the largest logit.")
    ] = 1e-4,
    int8_tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Largest accepted share of predictions that int8 changes.")
    ] = 0.05,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Export a student to ONNX, for onnxruntime and optimum, after comparing it with PyTorch on real rows.

    Prints size, latency in batches of 1 and 32, the largest difference of a logit, changed predictions and scores. If
    they differ by more than --tolerance or --int8-tolerance, nothing is written (exit code 1).

    Example: kdcache export runs/sst2 --int8

    Example: kdcache export models/classifier --data test.tsv --text sentence --label label --output-dir classifier-onnx
    """
    if to != "onnx":
        more = "OpenVINO reads model.onnx itself." if to == "openvino" else "onnxruntime and OpenVINO read it."
        raise RecipeError(f"--to is '{to}'; the only format is onnx", f"Export with --to onnx: {more}")
    from kdcache.progress import RichProgress
    from kdcache.students.export import ExportSettings, export_student

    settings = ExportSettings(int8, data, text, label, tolerance, int8_tolerance, trust_remote_code)
    report = export_student(student, output_dir, settings, progress=RichProgress())
    out.document({**report.as_dict(), "directory": str(report.directory)})
    out.table(*report.table())
    out.text()
    out.text(f"compared on {report.count:,} rows: {report.rows}; CPU, threads: {report.threads}")
    out.text(f"{report.directory}: README.md says how to load it")
