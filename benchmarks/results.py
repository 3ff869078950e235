"""Produces the results of docs/results.md: three real teachers, a small student, several methods and seeds, real data.

    python benchmarks/results.py run sst2 --weights weights --data data      # resumable; finished runs are skipped
    python benchmarks/results.py collect                                     # rewrites docs/results-tables.md

``weights`` holds Hugging Face folders named mpnet-base, granite-roberta, distilbert-cased and minilm-l6 (see
docs/results.md for their sources); ``data`` holds sst2-sentences/, sst2/ and rte/ as TSV. Each step is a plain
``kdcache`` command and is printed first, so that every line of the tables can be reproduced by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs")
TEACHERS = {"mpnet": "mpnet-base", "roberta": "granite-roberta", "distilbert": "distilbert-cased"}


@dataclass(frozen=True)
class Task:
    """A recipe, its keys that refer to local files, and the matrix of students."""

    recipe: str
    seeds: tuple[int, ...]
    data: dict[str, str]
    transfer: str | None = (
        None  # a file of texts without labels; they are in the cache, but only '+transfer' students read them
    )
    transfer_rows: int = 0
    cofinetune: dict[str, str] = field(default_factory=dict)
    distill: dict[str, str] = field(default_factory=dict)


TASKS = {
    "sst2": Task(
        "pipelines/sst2.toml",
        (0, 1, 2),
        {
            "train": "sst2-sentences/train.tsv",
            "validation": "sst2-sentences/dev.tsv",
            "test": "sst2-sentences/test.tsv",
        },
        transfer="sst2/train.tsv",
        transfer_rows=15_000,
    ),
    "rte": Task("pipelines/rte.toml", (0,), {"train": "rte/train.tsv", "test": "rte/dev.tsv"}),
}

METHODS: dict[str, list[str]] = {
    "fine-tune": ["distill.method=fine-tune"],
    "kd": ["distill.method=kd"],
    "mt-bert": ["distill.method=mt-bert"],
    "mt-bert, paper": ["distill.method=mt-bert", "distill.paper=true"],
}
WITH_TRANSFER = ("kd", "mt-bert")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do what is missing of one task")
    run.add_argument("task", choices=TASKS)
    run.add_argument("--weights", type=Path, default=Path("weights"))
    run.add_argument("--data", type=Path, default=Path("data"))
    run.add_argument("--only", choices=("teachers", "students"), help="one half of the work")
    run.add_argument("--seeds", type=int, nargs="*", help="of the students; all of the task's where not given")
    commands.add_parser("collect", help="write docs/results-tables.md from the finished runs")
    arguments = parser.parse_args()
    if arguments.command == "collect":
        target = ROOT / "docs" / "results-tables.md"
        target.write_text(
            "".join(section(name) for name in TASKS if (RUNS / name / "teachers").exists()), encoding="utf-8"
        )
        print(target.read_text(encoding="utf-8"))
        return
    settings = task_settings(TASKS[arguments.task], arguments.data, arguments.weights)
    if arguments.only != "students":
        make_teachers(arguments.task, settings)
    if arguments.only != "teachers":
        make_students(arguments.task, settings, arguments.seeds or TASKS[arguments.task].seeds)


def task_settings(task: Task, data: Path, weights: Path) -> list[str]:
    """Overrides that replace names of the recipe by local files and folders."""
    settings = [f"data.{key}={json.dumps(str((data / value).resolve()))}" for key, value in task.data.items()]
    settings += [
        f"teachers.{name}.model={json.dumps(str((weights / folder).resolve()))}" for name, folder in TEACHERS.items()
    ]
    settings += [f"student.init_from={json.dumps(str((weights / 'minilm-l6').resolve()))}"]
    if task.transfer:
        settings += [
            f"data.transfer={json.dumps([str((data / task.transfer).resolve())])}",
            f"data.transfer_rows={task.transfer_rows}",
        ]
    return settings


def make_teachers(name: str, settings: list[str]) -> None:
    """Co-finetune and dump; both continue after an interruption, and do nothing if they are complete."""
    timed(
        "cofinetune",
        name,
        ["cofinetune", TASKS[name].recipe, *flags(settings)],
        done=RUNS / name / "teachers" / "teachers.json",
    )
    timed(
        "dump",
        name,
        ["dump-teachers", TASKS[name].recipe, *flags(settings)],
        done=RUNS / name / "cache" / "manifest.json",
    )


def make_students(name: str, settings: list[str], seeds: Sequence[int]) -> None:
    """Train every method of the matrix with these seeds, from one cache."""
    for label, student, overrides in students(name, seeds):
        own = [*settings, *overrides, f'name="{student}"']
        timed(
            label,
            student,
            ["distill", TASKS[name].recipe, "--cache", str(RUNS / name / "cache"), *flags(own)],
            done=RUNS / student / "results.json",
        )


def students(name: str, seeds: Sequence[int]) -> Iterator[tuple[str, str, list[str]]]:
    """(label, run name, overrides) of each student of the task."""
    task = TASKS[name]
    for seed in seeds:
        for method, overrides in METHODS.items():
            plain = [*overrides, f"distill.seed={seed}", *(["data.transfer=[]"] if task.transfer else [])]
            yield method, run_name(name, method, seed), plain
        if task.transfer:
            for method in WITH_TRANSFER:
                yield (
                    f"{method} + transfer",
                    run_name(name, f"{method} + transfer", seed),
                    [*METHODS[method], f"distill.seed={seed}"],
                )


def run_name(task: str, method: str, seed: int) -> str:
    slug = method.replace(", ", "-").replace(" + ", "-").replace(" ", "-")
    return f"{task}-{slug}-{seed}"


def flags(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def timed(label: str, run: str, words: list[str], *, done: Path) -> None:
    """Run one kdcache command unless its output exists; write its wall time to runs/<run>/times.json."""
    if done.exists():
        print(f"done already: {run}: {label}", file=sys.stderr)
        return
    print(f"$ kdcache {shlex.join(words)}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kdcache", *words], check=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    record = RUNS / run / "times.json"
    times = json.loads(record.read_text()) if record.exists() else {}
    record.write_text(json.dumps(times | {label: round(time.perf_counter() - started, 1)}))


Results = dict[str, Any]


def section(name: str) -> str:
    """One task as Markdown: teachers; students with mean and spread over seeds; scales of loss terms; times."""
    found: dict[str, list[Results]] = {}
    for label, student, _ in students(name, TASKS[name].seeds):
        path = RUNS / student / "results.json"
        if path.exists():
            found.setdefault(label, []).append(json.loads(path.read_text()))
    rows = [
        "| model | seeds | validation accuracy | test accuracy | test macro-F1 | test Matthews | training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += teacher_rows(found)
    rows += [student_row(label, results) for label, results in found.items()]
    return "\n\n".join([f"### {name}", "\n".join(rows), scale_table(found), time_lines(name)]) + "\n\n"


def teacher_rows(found: dict[str, list[Results]]) -> list[str]:
    """Scores of the teachers and of their mean, from cached logits; equal in the results of all students."""
    taught = next((results[0] for results in found.values() if results[0]["teachers"]), None)
    if taught is None:
        return []
    rows = [f"| teacher {name} | | {cells([teacher['scores']])} | |" for name, teacher in taught["teachers"].items()]
    return [*rows, f"| mean of the teachers | | {cells([taught['teachers_mean']['scores']])} | |"]


def student_row(label: str, results: list[Results]) -> str:
    seconds = statistics.median(float(result["training_seconds"]) for result in results)
    return f"| student, {label} | {len(results)} | {cells([result['scores'] for result in results])} | {seconds:.0f} |"


def cells(scores: list[dict[str, dict[str, float]]]) -> str:
    """Mean ± sample standard deviation over seeds, one cell per column."""
    columns = (("validation", "accuracy"), ("test", "accuracy"), ("test", "macro_f1"), ("test", "matthews"))
    made = []
    for split, metric in columns:
        values = [float(score[split][metric]) for score in scores if split in score]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        made.append(f"{statistics.mean(values):.4f}{spread}" if values else "")
    return " | ".join(made)


def scale_table(found: dict[str, list[Results]]) -> str:
    """Every loss term before its weight, of the first seed: median over the steps."""
    scales = {label: {row["term"]: row["median"] for row in results[0]["scales"]} for label, results in found.items()}
    terms = sorted({term for medians in scales.values() for term in medians if term != "learning_rate"})
    rows = [f"| loss term, median | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for term in terms:
        values = [f"{medians[term]:.3g}" if term in medians else "" for medians in scales.values()]
        rows.append(f"| {term} | {' | '.join(values)} |")
    return "\n".join(rows)


def time_lines(name: str) -> str:
    """Wall times of the two stages that run once, and the size of the cache."""
    record = RUNS / name / "times.json"
    times = json.loads(record.read_text()) if record.exists() else {}
    lines = [f"- {stage}: {seconds:.0f} s" for stage, seconds in times.items()]
    cache = RUNS / name / "cache"
    if cache.exists():
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        lines.append(f"- cache: {size / 1e6:.1f} MB on disk")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
