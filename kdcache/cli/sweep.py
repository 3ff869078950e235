"""``kdcache sweep``: many students from one cache, compared."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.cli import stages
from kdcache.cli.guard import explain
from kdcache.cli.options import (
    RUNS,
    Job,
    Json,
    OutputDir,
    RecipeFile,
    RemoteUrl,
    Settings,
    TargetsCache,
    find_cache,
    open_job,
)
from kdcache.cli.output import out
from kdcache.errors import KdcacheError
from kdcache.training.processes import check_alone

if TYPE_CHECKING:
    from kdcache.cache.manifest import Manifest
    from kdcache.distill.sweep.cells import SweepStudent
    from kdcache.recipe import SweepSection


def sweep(
    recipe: RecipeFile,
    settings: Settings = None,
    output_dir: OutputDir = RUNS,
    cache: TargetsCache = None,
    remote: RemoteUrl = None,
    jobs: Annotated[int, typer.Option(min=1, help="Students that are trained at the same time, in processes.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of each process; default: cores / jobs.", show_default=False),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Train nothing; compare the students that are there.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace students made with other settings.")] = False,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Train the students of the recipe's [sweep] section from a cache, and compare them on validation.

    Students that are there are not trained again. If interrupted, run the same command again: it continues. A student
    that fails does not stop the others; the command then ends with exit code 1.

    Example: kdcache sweep sst2.toml --cache sst2-3t --jobs 2

    Example: kdcache sweep sst2.toml --set 'sweep.grid={"distill.weights.hidden"=[0.01, 0.1]}' --set sweep.seeds=[0,1]
    """
    from kdcache.distill.sweep.running import Worker
    from kdcache.distill.sweep.stage import SweepJob
    from kdcache.distill.sweep.stage import sweep as run_sweep
    from kdcache.recipe import load_recipe

    stages.join_processes()
    check_alone("kdcache sweep")
    job = open_job(recipe, settings, output_dir)
    job.recipe.require_student()
    caches = _open_caches(job, recipe, cache, remote)
    work = SweepJob(
        job.recipe,
        job.run,
        load=functools.partial(load_recipe, recipe, settings),
        identity=lambda named: caches[named].identity,
        provenance=lambda named: caches[named].provenance,
        finished=functools.partial(is_there, caches=caches, remote=remote),
        worker=Worker(functools.partial(train, caches=caches, remote=remote, replace=replace), explain),
        progress=job.progress,
        jobs=jobs,
        threads=threads,
    )
    document = run_sweep(work, train=not show)
    _show(document)
    if not show:
        out.note(f"page: {job.run.sweep / 'sweep.html'}")
    _end(document, show=show)


def _show(document: Mapping[str, Any]) -> None:
    from kdcache.report.sweep import sweep_lines, sweep_table

    out.document(document)
    out.table(*sweep_table(document))
    out.text()
    for line in sweep_lines(document):
        out.text(line)


@dataclass(frozen=True)
class OpenedCache:
    """A cache of the sweep: ``place`` is a directory or NAME@VERSION on the remote, None where there is no cache."""

    place: str | None
    identity: str
    provenance: Mapping[str, Any]


Caches = Mapping[str | None, OpenedCache]  # as a cell names it; None: that of the command


def train(student: SweepStudent, *, caches: Caches, remote: str | None, replace: bool) -> None:
    """Train one student as ``kdcache distill`` does; its progress goes to ``progress.log`` in its directory."""
    from kdcache.progress import RichProgress

    job = _job(student, caches, remote)
    job.run.create()
    with (job.run.root / "progress.log").open("a", encoding="utf-8") as log:
        stages.distill(replaced(job, progress=RichProgress(log)), replace=replace)


def is_there(student: SweepStudent, *, caches: Caches, remote: str | None) -> bool:
    """Whether the student is finished with these settings; its weights may have been deleted."""
    return student.run.results.exists() and stages.is_finished(_job(student, caches, remote), "student", weights=False)


def _job(student: SweepStudent, caches: Caches, remote: str | None) -> Job:
    from kdcache.progress import SilentProgress

    place = caches[student.cache].place
    found = student.run.cache if place is None else find_cache(place, remote)
    here, through = (found, None) if isinstance(found, Path) else (student.run.cache, found)
    return Job(student.recipe, student.run, student.run.whole.teachers, here, SilentProgress(), through)


def _open_caches(job: Job, recipe: Path, cache: str | None, remote: str | None) -> Caches:
    """Every cache that a cell may name, looked up once: a name stands for one version during the whole sweep."""
    own = str(job.run.cache) if job.run.cache.exists() else None
    caches: dict[str | None, OpenedCache] = {None: _opened(own if cache is None else cache, remote)}
    for named in _named(job.recipe.sweep):
        beside = recipe.resolve().parent / named
        caches[named] = _opened(str(beside) if beside.is_dir() else named, remote)
    return caches


def _opened(reference: str | None, remote: str | None) -> OpenedCache:
    from kdcache.cache.manifest import read_manifest
    from kdcache.share.pull import fetch_manifest

    if reference is None:
        return OpenedCache(None, "", {})
    found = find_cache(reference, remote)
    if isinstance(found, Path):
        manifest: Manifest = read_manifest(found)
        return OpenedCache(str(found.resolve()), manifest.identity, manifest.provenance)
    provenance = fetch_manifest(found.remote, found.ref).provenance
    return OpenedCache(found.ref.pinned, found.ref.identity, provenance)


def _named(section: SweepSection | None) -> list[str]:
    """The values of the key ``cache``, wherever they are."""
    from kdcache.recipe.sweep import CACHE

    if section is None:
        return []
    found = [cell[CACHE] for cell in section.settings() if CACHE in cell]
    space = {} if section.search is None else section.search.space
    values = space.get(CACHE, [])
    return list(dict.fromkeys([*found, *(values if isinstance(values, list) else [])]))


def _end(document: Mapping[str, Any], *, show: bool) -> None:
    """Raises KdcacheError if a student failed; says what is left if nothing was trained."""
    failed = [
        f"{cell['cell']} with seed {seed}: {text}"
        for cell in document["cells"]
        for seed, text in cell["failed"].items()
    ]
    wanted = len(document["cells"]) * len(document["seeds"])
    if show:
        there = sum(cell["seeds"] for cell in document["cells"])
        out.note(f"{there} of {wanted} students are there, {len(failed)} failed")
        return
    if failed:
        raise KdcacheError(
            f"{len(failed)} of {wanted} students failed; the first is {failed[0]}",
            "The others are complete. The same command tries these again.",
        )
