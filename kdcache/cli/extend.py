"""``kdcache cache extend``: add teachers, layers or rows to a cache, here or on the remote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.cli.options import CacheReference, Json, RemoteUrl, Settings, check_teacher_name, find_cache, layer_numbers
from kdcache.cli.output import out
from kdcache.errors import RecipeError
from kdcache.progress import counted, format_bytes

if TYPE_CHECKING:
    from kdcache.dump.extend import ExtendReport


def extend(
    reference: CacheReference,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="A teacher to run: a bundle of co-finetuned teachers, or a fine-tuned classifier. Repeatable.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="6,12", help="Layers to store of them; default: as the other teachers."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE", help="Recipe with new or edited rows, and settings for new teachers.", show_default=False
        ),
    ] = None,
    settings: Settings = None,
    tag: Annotated[
        str | None, typer.Option(metavar="TAG", help="A tag for the new version of a name.", show_default=False)
    ] = None,
    remote: RemoteUrl = None,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Add teachers, layers or rows to a cache; existing parts are neither run nor written again.

    A directory is extended in place. For a name, the needed files are fetched and the result is pushed as its next
    version; the old one stays. If interrupted, run the same command again: it continues.

    Example: kdcache cache extend sst2-3t --teacher deberta=runs/deberta/teachers

    Example: kdcache cache extend runs/sst2/cache --teacher bert=runs/sst2/teachers --layers 4,8

    Example: kdcache cache extend sst2-3t --recipe sst2.toml --teacher bert=DIR --teacher roberta=DIR --teacher
    deberta=DIR
    """
    from kdcache.cli.stages import provenance
    from kdcache.dump.extend import Wanted, extend_cache
    from kdcache.dump.next_version import extend_version
    from kdcache.progress import RichProgress
    from kdcache.recipe import load_recipe
    from kdcache.share.local_store import default_store

    if settings and recipe is None:
        raise RecipeError("--set changes keys of a recipe, and none is given", "Name the recipe: --recipe RECIPE")
    loaded = load_recipe(recipe, settings) if recipe is not None else None
    wanted = Wanted(_teachers(teacher or []), layer_numbers(layers), loaded)
    place, progress = find_cache(reference, remote), RichProgress()
    if isinstance(place, Path):
        if tag is not None:
            raise RecipeError(
                "--tag belongs to a name on the remote",
                "Push the directory with: kdcache cache push PATH --name NAME --tag TAG",
            )
        published = None
        report = extend_cache(place, wanted, progress=progress, provenance=provenance())
    else:
        report, published = extend_version(
            place.remote, place.ref, wanted, store=default_store(), tag=tag, progress=progress, provenance=provenance()
        )
    out.document({**report.as_dict(), "reference": published})
    _show(report, published)


def _teachers(given: list[str]) -> dict[str, Path]:
    teachers: dict[str, Path] = {}
    for flag in given:
        name, _, path = flag.partition("=")
        if not name or not path:
            raise RecipeError(f"--teacher {flag} is not NAME=DIR", "Such as: --teacher deberta=runs/deberta/teachers")
        if name in teachers:
            raise RecipeError(f"--teacher names '{name}' twice", "Name each teacher once.")
        check_teacher_name(name)
        teachers[name] = Path(path)
    return teachers


def _show(report: ExtendReport, published: str | None) -> None:
    for run in report.runs:
        out.text(run.line())
    if not report.runs:
        out.text("nothing was missing: no teacher ran")
    out.text(
        f"{counted(report.new_texts, 'new text')}; {format_bytes(report.bytes_new)} new, "
        f"{format_bytes(report.bytes_shared)} shared with the old version"
    )
    out.text(f"identity {report.identity}" + (f", published as {published}" if published else ""))
