"""The page that compares several runs: the same parts as the page of one, with a student of each run."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import RecipeError
from kdcache.files import replace_file
from kdcache.report import charts
from kdcache.report.cautions import cautions
from kdcache.report.html import Block, Caution, Cell, Figure, Page, Section, Side, Table, Text, noted, percent, render
from kdcache.report.intervals import paired_difference, spread
from kdcache.report.loaded import LoadedRun, load_baseline, load_run
from kdcache.report.losses import by_stage, loss_shares, read_curves, weights_of_terms
from kdcache.report.process import DISTILL
from kdcache.report.quality import (
    MISSING,
    Model,
    agreement_blocks,
    class_names,
    cost_section,
    models_of,
    same_rows,
    score_section,
)
from kdcache.report.rows import by_class, counted
from kdcache.report.sweep import short
from kdcache.runs import RunDirectory, read_record

if TYPE_CHECKING:
    from kdcache.report.predictions import Answers

_CLASSES = 30  # that are compared
_DIGEST = len("sha256:") + 12  # characters that are shown
Runs = Mapping[str, LoadedRun]  # by the name on the page


def write_comparison(runs: Sequence[RunDirectory], path: Path) -> Path:
    """Write the page of several runs to ``path``. Raises RecipeError for runs that cannot be compared, StorageError."""
    replace_file(path, render(comparison(load_runs(runs))).encode())
    return path


def load_runs(runs: Sequence[RunDirectory]) -> dict[str, LoadedRun]:
    """The runs by their names, or by their paths where two have the same name. RecipeError for different classes."""
    roots = list(dict.fromkeys(run.root.resolve() for run in runs))
    names = [root.name for root in roots]
    shown = [str(root) if names.count(root.name) > 1 else root.name for root in roots]
    loaded = {name: load_run(RunDirectory(root)) for name, root in zip(shown, roots, strict=True)}
    first, *others = loaded.values()
    for other in others:
        if other.labels != first.labels or other.split != first.split:
            raise RecipeError(
                f"'{other.run.root}' cannot be compared with '{first.run.root}': it has other classes, or is scored on "
                f"{other.split} instead of {first.split}",
                "Compare runs of one task, each with a page of its own otherwise.",
            )
    return loaded


def comparison(runs: Runs) -> Page:
    """The contents of the page; the last run is compared with each other one."""
    first = next(iter(runs.values()))
    models = students(runs)
    lacking = [name for name, loaded in runs.items() if loaded.rows is None]
    missing = f"Without answers to each row: {', '.join(lacking)}. {MISSING.format('RUN')} makes them."
    sections = [
        score_section([*_teachers(runs), *models], first.split, [missing] if lacking else []),
        _seeds_section(runs, first.split),
        cost_section([*_teachers(runs), *models], first.split, first.results.get("machine", {})),
        _class_section(runs),
        _agreement_section(models, first),
        _training_section(runs),
        Section("settings", "What differs between the runs?", [_differences(runs)]),
    ]
    return Page(
        " · ".join(runs) if len(runs) < 4 else f"{len(runs)} runs",
        [section for section in sections if section is not None],
        _cautions(runs),
        subtitle=f"{len(runs)} runs, scored on {first.split}",
    )


def _cautions(runs: Runs) -> list[Caution]:
    """The warnings of all runs; one that several have occurs once, with their names."""
    names: dict[Caution, list[str]] = {}
    for name, loaded in runs.items():
        for found in cautions(loaded, load_baseline(loaded.run)):
            names.setdefault(found, []).append(name)
    return [Caution(f"{', '.join(having)}: {found.text}", found.hint) for found, having in names.items()]


def students(runs: Runs) -> list[Model]:
    """The student of each run, under the name of the run."""
    return [replace(models_of(loaded, None)[-1], name=name, role="student") for name, loaded in runs.items()]


def _teachers(runs: Runs) -> list[Model]:
    """The teachers of all runs; one with the same name and scores occurs once."""
    found: dict[tuple[str, str], Model] = {}
    for loaded in runs.values():
        for model in models_of(loaded, None):
            if model.role == "teacher":
                found.setdefault((model.name, json.dumps(model.scores, sort_keys=True)), model)
    names = [model.name for model in found.values()]
    return [
        model if names.count(model.name) == 1 else replace(model, name=f"{model.name} ({number})")
        for number, model in enumerate(found.values(), start=1)
    ]


def same_but_seed(runs: Runs) -> list[list[str]]:
    """Names of the runs in groups that differ in their seed alone, in order; a seed occurs once in a group."""
    groups: dict[str, list[str]] = {}
    seen: Counter[str] = Counter()
    for name, loaded in runs.items():
        key = json.dumps(_all_but_seed(loaded), sort_keys=True)
        with_seed = f"{_seed(loaded)} {key}"
        groups.setdefault(f"{seen[with_seed]} {key}", []).append(name)  # one more with this seed is of another group
        seen[with_seed] += 1
    return list(groups.values())


def _all_but_seed(loaded: LoadedRun) -> list[Any]:
    """What the student was made from. Older runs lack some of it, which is None then."""
    results, recorded = loaded.results, _inputs(loaded.run)
    settings = {key: value for key, value in results.get("settings", {}).items() if key != "seed"}
    of_student = ("init_from", "head", "width", "parameters")
    student = {key: results.get("student", {}).get(key) for key in of_student}
    data = {key: value for key, value in recorded.items() if key.startswith("data.")}
    identity = [results.get(key) for key in ("method", "cache_identity", "max_length", "rows")]
    return [*identity, settings, student, _layers(loaded, recorded), data]


def _seed(loaded: LoadedRun) -> int:
    return int(loaded.results.get("seed", 0))


def _inputs(run: RunDirectory) -> Mapping[str, str]:
    """What run.json says the student was made from: data files by their sha256; empty without a record."""
    whole, stage = run, "student"
    if run.root.name == "baseline" and not run.record.exists():  # recorded in the run that it belongs to
        whole, stage = RunDirectory(run.root.parent), "baseline"
    entry = read_record(whole).get("stages", {}).get(stage, {})
    inputs: Mapping[str, str] = entry.get("inputs", {})
    return inputs


def _layers(loaded: LoadedRun, recorded: Mapping[str, str]) -> int | list[int] | None:
    """The blocks that the student kept: K for the first K, else their numbers; without a record how many it has."""
    kept: int | list[int] | None = json.loads(recorded.get("student.layers", "null"))
    if kept is None:
        kept = loaded.results.get("student", {}).get("layers")
    return len(kept) if isinstance(kept, list) and kept == [*range(1, len(kept) + 1)] else kept


def _seeds_section(runs: Runs, split: str) -> Section | None:
    """Means and spreads over seeds, where runs differ in their seed alone."""
    groups = same_but_seed(runs)
    if all(len(group) == 1 for group in groups):
        return None
    by_seed = [
        {_seed(runs[name]): float(runs[name].results["scores"][split]["accuracy"]) for name in group}
        for group in groups
    ]
    rows: list[list[Cell]] = []
    for group, found in zip(groups, by_seed, strict=True):
        deviation = spread(list(found.values()))
        difference = None if group is groups[0] else paired_difference(found, by_seed[0])
        rows.append(
            [
                ", ".join(group),
                ", ".join(map(str, found)),
                f"{statistics.fmean(found.values()):.4f}",
                "" if deviation is None else f"{deviation:.4f}",
                None if difference is None else _points(difference.mean, difference.low, difference.high),
            ]
        )
    columns = [
        "runs",
        "seeds",
        f"mean {split} accuracy",
        "spread over seeds",
        f"points against {groups[0][0]}, …, by seed",
    ]
    note = "The spread is the sample standard deviation; the interval is Student's t over seeds, 95 %. "
    note += "A row has each seed once: runs with the same seed are on rows of their own."
    table = Table(columns, rows, left=frozenset((0, 1)))
    return Section("seeds", "How much do seeds matter?", [table, Text(note, muted=True)])


def _points(mean: float, low: float | None, high: float | None) -> dict[str, str]:
    around = "" if low is None or high is None else f"{100 * low:+.1f} to {100 * high:+.1f}"
    return noted(f"{100 * mean:+.1f}", around)


def _class_section(runs: Runs) -> Section | None:
    """F1 of each class by run; of many classes those on which the runs differ most."""
    counts, names = {}, list[str]()
    for name, loaded in runs.items():
        if loaded.rows is not None and (loaded.rows.labels >= 0).any():
            names = class_names(loaded, loaded.rows)
            counts[name] = counted(loaded.rows.labels, loaded.rows.student.predictions, len(names))
    if len(counts) < 2:
        return None
    found = {name: [one.f1 or 0.0 for one in by_class(table)] for name, table in counts.items()}
    ranges = [max(column) - min(column) for column in zip(*found.values(), strict=True)]
    order = sorted(range(len(ranges)), key=lambda label: (-ranges[label], label))[:_CLASSES]
    rows = [[names[label], *(percent(values[label]) for values in found.values())] for label in order]
    title = "F1 of each class; the classes on which the runs differ most come first."
    return Section("errors", "Which classes differ?", [Text(title), Table(["class", *found], rows)])


def _agreement_section(models: Sequence[Model], first: LoadedRun) -> Section | None:
    """Agreement and calibration of the students that answered the same rows as the first."""
    rows = first.rows
    if rows is None:
        return None
    answers: dict[str, Answers] = {
        model.name: model.answers for model in models if model.answers is not None and same_rows(model, models[0])
    }
    blocks = list(agreement_blocks(rows.labels, answers, first.split))
    return Section("agreement", "Do the students agree, and are they calibrated?", blocks) if blocks else None


def _training_section(runs: Runs) -> Section | None:
    """The share of each loss term by run, and validation accuracy over the steps."""
    shares, curves = [], []
    for name, loaded in runs.items():
        for stage, logged in by_stage(read_curves(loaded.run.metrics, "steps")).items():
            found = loss_shares(logged, weights_of_terms(loaded.results, stage)) if stage.startswith(DISTILL) else None
            shown = name if stage == DISTILL else f"{name}, {stage}"
            terms = {} if found is None else found.of_all()
            shares += [
                {"name": shown, "part": term, "value": share, "place": place}
                for place, (term, share) in enumerate(terms.items())
            ]
        for curve in read_curves(loaded.run.metrics, "epoch"):
            if curve.stage.startswith(DISTILL) and curve.name == "validation/accuracy":
                points = charts.thinned(curve.steps, curve.values)
                curves += [{"name": name, "step": step, "accuracy": value} for step, value in points]
    blocks: list[Block] = []
    if shares:
        names, parts = ([*dict.fromkeys(str(row[key]) for row in shares)] for key in ("name", "part"))
        spec = charts.bars(shares, names, parts, "share of the loss", ".0%")
        blocks.append(Figure("Shares of the loss terms", spec, "weighted, over all steps"))
    if curves:
        names = [*dict.fromkeys(str(row["name"]) for row in curves)]
        spec = charts.lines(curves, ("step", "step"), ("accuracy", "accuracy"), names)
        blocks.append(Figure("Validation accuracy", spec))
    return Section("training", "How did they train?", [Side(blocks)]) if blocks else None


def _differences(runs: Runs) -> Block:
    """The settings that are not the same in all runs."""
    flat = {name: _settings(loaded) for name, loaded in runs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    differing = [key for key in keys if len({json.dumps(values.get(key)) for values in flat.values()}) > 1]
    if not differing:
        return Text("Nothing that results.json and run.json record.")
    rows = [[key, *(short(values.get(key)) for values in flat.values())] for key in differing]
    return Table(["setting", *flat], rows)


def _settings(loaded: LoadedRun) -> dict[str, Any]:
    """Settings of the training by dotted key, its data, and what the student was made of."""
    results, recorded = loaded.results, _inputs(loaded.run)
    found: dict[str, Any] = {}
    for key, value in results.get("settings", {}).items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        found |= {f"distill.{key}{'.' if name else ''}{name}": each for name, each in inner}
    student = {f"student.{key}": results.get("student", {}).get(key) for key in ("init_from", "head", "parameters")}
    student["student.layers"] = _layers(loaded, recorded)
    rows = {f"rows of {split}": count for split, count in results.get("rows", {}).items()}
    files = {
        key: value[:_DIGEST] if value.startswith("sha256:") else value
        for key, value in recorded.items()
        if key.startswith("data.")
    }
    whole = {"teachers": ", ".join(results.get("teachers", {})), "cache": str(results.get("cache_identity") or "")[:12]}
    data = {**rows, **files, "max_length": results.get("max_length")}
    return {"method": results.get("method"), **found, **student, **whole, **data}
