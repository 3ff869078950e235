"""The ``kdcache`` program: commands by name, each behind the guard that turns exceptions into exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import typer

from kdcache import __version__
from kdcache.cli import (
    audit,
    augment,
    cache,
    cofinetune,
    diff,
    distill,
    dump,
    env,
    evaluate,
    export,
    extend,
    init,
    methods,
    pipelines,
    plan,
    remote,
    report,
    run,
    share,
    sweep,
    tables,
    weigh,
)
from kdcache.cli.guard import guarded
from kdcache.cli.output import out

if TYPE_CHECKING:
    from typer.core import TyperCommand


def _group(about: str, *, completion: bool = False) -> typer.Typer:
    return typer.Typer(
        help=about,
        no_args_is_help=True,
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


app = _group(
    "Multi-teacher distillation of language models from a cache: the teachers run only once.\n\n"
    "Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 usage or recipe, 3 damage or a "
    "difference "
    "found, 4 refused because something does not match, 130 interrupted.",
    completion=True,
)
_cache = _group("Look at caches, check them, share them with the team.")
_remote = _group("The remote, where a team keeps its caches.")
_pipelines = _group("The recipes that come with kdcache.")


def _add(group: typer.Typer, name: str, command: Callable[..., None], form: type[TyperCommand] | None = None) -> None:
    group.command(name, cls=form)(guarded(command))


_add(app, "init", init.init)
_add(app, "cofinetune", cofinetune.cofinetune)
_add(app, "augment", augment.augment)
_add(app, "plan", plan.plan)
_add(app, "dump-teachers", dump.dump_teachers)
_add(app, "audit", audit.audit)
_add(app, "weigh", weigh.weigh)
_add(app, "distill", distill.distill)
_add(app, "sweep", sweep.sweep)
_add(app, "run", run.run)
_add(app, "evaluate", evaluate.evaluate)
_add(app, "export", export.export)
_add(app, "report", report.report)
_add(app, "methods", methods.methods)
_add(app, "env", env.env)
_add(_cache, "info", cache.info)
_add(_cache, "verify", cache.verify)
_add(_cache, "extend", extend.extend)
_add(_cache, "export", tables.export)
_add(_cache, "import", tables.import_)
_add(_cache, "diff", diff.diff)
for _name in ("push", "pull", "rm", "gc", "status"):
    _add(_cache, _name, getattr(share, _name))
_add(_cache, "ls", share.ls, share.BareRemote)
_add(_remote, "check", remote.check)
for _name in ("ls", "cp", "validate", "prepare"):
    _add(_pipelines, _name, getattr(pipelines, _name))
app.add_typer(_cache, name="cache")
app.add_typer(_remote, name="remote")
app.add_typer(_pipelines, name="pipelines")


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: bool = typer.Option(False, "--version", help="Show the version.")) -> None:
    if version:
        out.text(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and leave with its exit code."""
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="kdcache")
    finally:  # a Python program may call this more than once
        out.json = out.quiet = False
