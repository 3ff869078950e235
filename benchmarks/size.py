"""Measures student accuracy by bytes per token: the same teachers and student, hidden states in ten storage formats.

    python benchmarks/size.py run                    # from a fresh clone: the quickstart's data and teachers
    python benchmarks/size.py collect quickstart --to benchmarks/measured                 # both: make bench-size
    python benchmarks/size.py run --recipe pipelines/sst2.toml --teachers runs/sst2/teachers --set 'data.transfer=[]'
    python benchmarks/size.py collect sst2           # the table and the plot of docs/accuracy-against-bytes.md

``run`` dumps once, in float32 at full width. The code of the dump makes every other format from that cache (see
size_forms.py). States of product quantisation are decoded and stored at full width. A student is trained for each
format, with the recipe's settings and ``mt-bert``; seed 0 of every format comes first. Students without a teacher and
without hidden states are trained too, or taken from a run of results.py. Finished work is skipped, so an interrupted
run continues. With three teachers of width 768 a student takes about five minutes on one core. The share of variance
kept is measured on test texts, on which nothing was fitted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import size_page
from size_forms import EXACT, FORMS, extract_unseen, form_settings, store, widths
from size_page import REFERENCES

from kdcache.data.task import load_task
from kdcache.recipe import load_recipe

DOCS = Path(__file__).resolve().parent.parent / "docs"
QUICKSTART = Path("quickstart/quickstart.toml")


@dataclass(frozen=True)
class Job:
    """A recipe with overrides; its runs are ``<name>-size-<form>`` in ``runs``."""

    recipe: Path
    overrides: tuple[str, ...]
    teachers: Path
    runs: Path
    name: str

    def cache(self, form: str) -> Path:
        return self.runs / f"{self.name}-size-{form}" / "cache"

    def measured(self, form: str) -> Path:
        return self.runs / f"{self.name}-size-{form}" / "measured.json"

    @property
    def unseen(self) -> Path:
        return self.runs / f"{self.name}-size-{EXACT}" / "unseen"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do what is missing")
    run.add_argument("--recipe", type=Path, help="of a run whose teachers are there; the quickstart's where not given")
    run.add_argument("--teachers", type=Path, help="runs/<name>/teachers where not given")
    run.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    run.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    run.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS))
    run.add_argument(
        "--references",
        nargs="*",
        choices=REFERENCES,
        default=list(REFERENCES),
        help="students that see no hidden state",
    )
    run.add_argument("--unseen", type=int, default=512, help="texts that the share of variance kept is measured on")
    collect = commands.add_parser("collect", help="the table and the plot of finished students")
    collect.add_argument("name", help="of the recipe")
    collect.add_argument("--to", type=Path, default=DOCS)
    for command in (run, collect):
        command.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    if arguments.command == "collect":
        arguments.to.mkdir(parents=True, exist_ok=True)
        print(size_page.write(arguments.runs, arguments.name, arguments.to))
        return
    job = open_job(arguments)
    dump_exact(job, arguments.unseen)
    for seed in arguments.seeds:
        for form in arguments.forms:
            make_form(job, form)
            distil(job, job.cache(form), f"{job.name}-size-{form}-{seed}", "mt-bert", seed)
        for method in arguments.references:
            distil(job, job.cache(EXACT), f"{job.name}-{method}-{seed}", method, seed)


def open_job(arguments: argparse.Namespace) -> Job:
    """The requested run; without a recipe the quickstart is prepared and its teachers are trained."""
    recipe = arguments.recipe or QUICKSTART
    if arguments.recipe is None and not recipe.exists():
        kdcache(["pipelines", "prepare", "quickstart"])
    name = load_recipe(recipe, arguments.overrides).name
    teachers = arguments.teachers or arguments.runs / name / "teachers"
    if arguments.recipe is None:
        kdcache(["cofinetune", str(recipe), "--output-dir", str(arguments.runs), *flags(arguments.overrides)])
    return Job(recipe, tuple(arguments.overrides), teachers, arguments.runs, name)


def dump_exact(job: Job, texts: int) -> None:
    """Run the teachers once: float32 at full width, and the unseen rows."""
    keep_teachers_beside(job, EXACT)
    sections = load_recipe(job.recipe, job.overrides).teachers
    whole = form_settings(FORMS[EXACT], {section.name: 0 for section in sections})
    own = [*job.overrides, *whole, f'name="{job.name}-size-{EXACT}"']
    if not (job.cache(EXACT) / "manifest.json").exists():
        kdcache(
            [
                "dump-teachers",
                str(job.recipe),
                "--teachers",
                str(job.teachers),
                "--output-dir",
                str(job.runs),
                *flags(own),
            ]
        )
    if not (job.unseen / "done").exists():
        print(f"hidden states of {texts} unseen texts -> {job.unseen}", file=sys.stderr, flush=True)
        recipe = load_recipe(job.recipe, [*job.overrides, *whole])
        extract_unseen(recipe, load_task(recipe.data), job.teachers, texts, job.unseen)
        (job.unseen / "done").touch()


def make_form(job: Job, form: str) -> None:
    """Make the cache of a format, and measure its bytes and the variance kept; measured.json is written last."""
    if job.measured(form).exists():
        return
    settings = form_settings(FORMS[form], widths(job.cache(EXACT)))
    keep_teachers_beside(job, form)
    print(
        f"{form}: {job.cache(EXACT)} -> {job.cache(form)} with {shlex.join(flags(settings))}",
        file=sys.stderr,
        flush=True,
    )
    recipe = load_recipe(job.recipe, [*job.overrides, *settings])
    found = store(recipe, job.teachers, job.cache(EXACT), FORMS[form], job.cache(form), job.unseen)
    job.measured(form).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def keep_teachers_beside(job: Job, form: str) -> None:
    """The teachers directory, for students that start from a teacher."""
    link = job.cache(form).parent / "teachers"
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(job.teachers.resolve())


def distil(job: Job, cache: Path, name: str, method: str, seed: int) -> None:
    """Train one student, unless it is finished."""
    if (job.runs / name / "results.json").exists():
        print(f"done already: {name}", file=sys.stderr, flush=True)
        return
    own = [*job.overrides, f'distill.method="{method}"', f"distill.seed={seed}", f'name="{name}"']
    kdcache(["distill", str(job.recipe), "--cache", str(cache), "--output-dir", str(job.runs), *flags(own)])


def flags(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def kdcache(words: list[str]) -> None:
    print(f"$ kdcache {shlex.join(words)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "kdcache", *words], check=True)


if __name__ == "__main__":
    main()
