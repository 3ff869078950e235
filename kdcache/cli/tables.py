"""``kdcache cache export|import``: a cache as plain tables, and the answers of something else into a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from kdcache.cli.options import (
    CacheReference,
    Json,
    RemoteUrl,
    Settings,
    check_teacher_name,
    find_cache,
    is_published,
)  # fmt: skip
from kdcache.cli.output import out
from kdcache.errors import RecipeError
from kdcache.progress import counted, format_bytes

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.cache.spec import TaskSpec
    from kdcache.data.answers import AnswerFormat
    from kdcache.data.cache_export import CacheExport, ExportChoice
    from kdcache.dump.imported import ImportedTeacher
    from kdcache.dump.run import TeacherRun
    from kdcache.recipe import Recipe
    from kdcache.share.reading_through import RemoteCache


def export(
    cache: CacheReference,
    output_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of the data set to write.", show_default=False)
    ],
    to: Annotated[str, typer.Option("--to", metavar="parquet|jsonl", help="The format of the files.")] = "parquet",
    split: Annotated[
        list[str] | None, typer.Option(metavar="SPLIT", help="A split; repeatable; default: all.", show_default=False)
    ] = None,
    teacher: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A teacher; repeatable; default: all.", show_default=False)
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Probabilities instead of logits: softmax at --temperature.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of --probabilities.")] = 1.0,
    pooled: Annotated[bool, typer.Option("--pooled", help="Also the pooled vectors, where they are stored.")] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE", help="Recipe of the data, for a cache without texts.", show_default=False),
    ] = None,
    settings: Settings = None,
    remote: RemoteUrl = None,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Write texts, labels and teacher outputs as files that datasets, pandas, setfit and sentence-transformers read.

    Columns: the text columns, label, logits_TEACHER (or probabilities_TEACHER, pooled_TEACHER), row, text_id. If
    interrupted, run the same command again: it continues.

    Example: kdcache cache export runs/sst2/cache --output-dir sst2-logits

    Example: kdcache cache export sst2-3t --to jsonl --split train --teacher bert --probabilities --output-dir DIR
    """
    from kdcache.data.cache_export import ExportChoice, TableFormat
    from kdcache.progress import SilentProgress

    if to not in get_args(TableFormat):
        raise RecipeError(f"--to is '{to}'; the formats are parquet and jsonl", "Such as: --to parquet")
    values = "probabilities" if probabilities else "logits"
    names = tuple(dict.fromkeys(split)) if split else None, tuple(dict.fromkeys(teacher)) if teacher else None
    choice = ExportChoice(to, *names, values, temperature, pooled)  # type: ignore[arg-type]
    found = find_cache(cache, remote)
    if isinstance(found, Path):
        from kdcache.cache.reader import open_cache

        report = _exported(open_cache(found), output_dir, choice, recipe, settings)
    else:
        with found.read(SilentProgress()) as opened:
            report = _exported(opened, output_dir, choice, recipe, settings)
    kept = {"files": report.files, "files_kept": report.kept}
    out.document({"directory": str(output_dir), "rows": dict(report.rows), "columns": list(report.columns), **kept})
    rows = ", ".join(f"{name} {count:,}" for name, count in report.rows.items())
    earlier = f", {report.kept} of them from an earlier call" if report.kept else ""
    out.text(f"{output_dir}: {counted(report.files, 'file')}{earlier}; rows: {rows}")
    out.text(f"columns: {', '.join(report.columns)}")


def _exported(
    cache: Cache, target: Path, choice: ExportChoice, recipe: Path | None, settings: list[str] | None
) -> CacheExport:
    from kdcache.data.cache_export import export_cache
    from kdcache.progress import RichProgress

    texts = None
    if recipe is not None:
        from kdcache.data.task import load_task
        from kdcache.recipe import load_recipe

        texts = load_task(load_recipe(recipe, settings).data).texts
    return export_cache(cache, target, choice, texts=texts, progress=RichProgress())


def import_(
    cache: CacheReference,
    teacher: Annotated[
        str,
        typer.Option(metavar="NAME=FILE", help="The new teacher, and the file with its answers.", show_default=False),
    ],
    answers: Annotated[
        str,
        typer.Option("--as", metavar="KIND", help="What the columns hold: logits, probabilities, labels or votes."),
    ] = "probabilities",
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[CLASS=]COLUMN",
            help="A column for each class; or one with a list or an object; or with labels. Repeatable.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Text column; twice for pairs; default: the cache's.", show_default=False),
    ] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="LABEL=CLASS", help="What a label of the file is called in the cache.", show_default=False
        ),
    ] = None,
    smoothing: Annotated[
        float | None,
        typer.Option(
            help="Share of equal probabilities mixed in; default: 0.1 for labels and votes, else 0.", show_default=False
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Who answered, for the card; default: the file's name.", show_default=False)
    ] = None,
    licence: Annotated[str, typer.Option(help="Of the answers, for the card.", show_default=False)] = "",
    write_missing: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to list texts without an answer (JSON lines).", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE", help="Recipe of the data: makes a new cache if there is none.", show_default=False
        ),
    ] = None,
    settings: Settings = None,
    tag: Annotated[
        str | None, typer.Option(metavar="TAG", help="A tag for the new version of a name.", show_default=False)
    ] = None,
    remote: RemoteUrl = None,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Add soft labels of something else as a teacher: an LLM judge, a vendor's classifier, annotators.

    Rows join by their text. Every text of the cache needs an answer. The teacher has logits only; methods that need no
    hidden states use it. A directory is changed in place, a name gets a new version.

    Example: kdcache cache import runs/sst2/cache --teacher judge=judge.jsonl --column negative=p0 --column positive=p1

    Example: kdcache cache import runs/sst2/cache --teacher people=votes.csv --as votes --column a --column b --map
    pos=positive --map neg=negative
    """
    from kdcache.dump.imported import ImportedTeacher
    from kdcache.recipe import load_recipe

    name, _, file = teacher.partition("=")
    if not name or not file:
        raise RecipeError(f"--teacher {teacher} is not NAME=FILE", "Such as: --teacher judge=judge.jsonl")
    how = _answer_format(answers, column or [], text, map_ or [], smoothing)

    def imported(task: TaskSpec) -> ImportedTeacher:
        from kdcache.data.answers import read_answers

        found = read_answers(Path(file), task, how)
        return ImportedTeacher(found, source or Path(file).name, licence, write_missing)

    check_teacher_name(name)
    if recipe is not None and not _exists(cache, remote):
        if tag is not None:
            raise RecipeError(
                f"there is no cache '{cache}' yet; --tag belongs to a name on the remote",
                "Import into a new directory, then: kdcache cache push PATH --name NAME --tag TAG",
            )
        identity, run = _into_new_cache(Path(cache), recipe, settings, name, imported)
        document = {"cache": cache, "before": None, "identity": identity, "teachers": {name: run.as_dict()}}
        published = None
    else:
        loaded = None if recipe is None else load_recipe(recipe, settings)
        document, published, run = _into_cache(find_cache(cache, remote), name, imported, loaded, tag)
    out.document({**document, "reference": published})
    out.text(f"{name}: {counted(run.texts, 'text')}, {format_bytes(run.bytes)}" if run.texts else "nothing was missing")
    out.text(f"identity {document['identity']}" + (f", published as {published}" if published else ""))


def _exists(cache: str, url: str | None) -> bool:
    """Whether a reference means a cache: a directory that holds one, or a name on the remote, if one is set."""
    if Path(cache).is_dir():
        return (Path(cache) / "manifest.json").is_file()
    return url is not None or is_published(cache)


def _answer_format(
    kind: str, columns: list[str], text: list[str] | None, names: list[str], smoothing: float | None
) -> AnswerFormat:
    from kdcache.data.answers import KINDS, AnswerFormat

    if kind not in KINDS:
        raise RecipeError(f"--as is '{kind}'; it is one of: {', '.join(KINDS)}", "Such as: --as probabilities")
    pairs = [one.rpartition("=") for one in columns]
    mapped = {}
    for flag in names:
        label, _, name = flag.rpartition("=")
        if not label or not name:
            raise RecipeError(f"--map {flag} is not LABEL=CLASS", "Such as: --map pos=positive")
        mapped[label] = name
    named = tuple((label or None, column) for label, _, column in pairs)
    return AnswerFormat(kind, named, tuple(text) if text else None, mapped, smoothing)


def _into_new_cache(
    cache: Path, recipe: Path, settings: list[str] | None, name: str, imported: Callable[[TaskSpec], ImportedTeacher]
) -> tuple[str, TeacherRun]:
    from kdcache.cli.stages import provenance
    from kdcache.data.task import load_task
    from kdcache.dump.imported import import_into_new_cache
    from kdcache.dump.specs import task_spec
    from kdcache.progress import RichProgress
    from kdcache.recipe import load_recipe

    loaded = load_recipe(recipe, settings)
    task = load_task(loaded.data)
    manifest, run = import_into_new_cache(
        cache, loaded, name, imported(task_spec(task)), progress=RichProgress(), task=task, provenance=provenance()
    )
    return manifest.identity, run


def _into_cache(
    place: Path | RemoteCache,
    name: str,
    imported: Callable[[TaskSpec], ImportedTeacher],
    recipe: Recipe | None,
    tag: str | None,
) -> tuple[dict[str, Any], str | None, TeacherRun]:
    """The document, the published version if the cache is on a remote, and what was written."""
    from kdcache.cache.manifest import read_manifest
    from kdcache.cli.stages import provenance
    from kdcache.dump.extend import Wanted, extend_cache
    from kdcache.dump.next_version import extend_version
    from kdcache.progress import RichProgress
    from kdcache.share.local_store import default_store
    from kdcache.share.pull import fetch_manifest

    progress, published = RichProgress(), None
    if isinstance(place, Path):
        if tag is not None:
            raise RecipeError("--tag belongs to a name on the remote", "Push the directory: kdcache cache push PATH")
        wanted = Wanted({}, recipe=recipe, answers={name: imported(read_manifest(place).contents.task)})
        report = extend_cache(place, wanted, progress=progress, provenance=provenance())
    else:
        task = fetch_manifest(place.remote, place.ref).contents.task
        wanted = Wanted({}, recipe=recipe, answers={name: imported(task)})
        report, published = extend_version(
            place.remote, place.ref, wanted, store=default_store(), tag=tag, progress=progress, provenance=provenance()
        )
    return report.as_dict(), published, report.runs[0]
