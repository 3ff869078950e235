"""Tables and plot of accuracy against bytes, from the students that are finished."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import size_plot
from page import table
from size_forms import FORMS, Form

from kdcache.report.losses import read_curves

LAST_STEPS = 50  # last steps, over which the hidden loss is averaged
WHOLE = "float16"  # the format that the others are compared with
REFERENCES = {"kd": "soft labels alone (`kd`)", "fine-tune": "no teacher (`fine-tune`)"}


@dataclass(frozen=True)
class Student:
    """One finished run.

    ``hidden``: final loss of each (teacher, layer of the teacher); 1 for a student that predicts the mean.
    """

    seed: int
    scores: Mapping[str, float]  # accuracy by split
    rows: int  # rows of the last split
    hidden: Mapping[tuple[str, int], float]

    @property
    def accuracy(self) -> float:
        return list(self.scores.values())[-1]


@dataclass(frozen=True)
class Measured:
    """A format: its layers (teacher, layer, width, dim, bytes, kept), tokens per teacher, finished students by seed."""

    name: str
    layers: Sequence[Mapping[str, Any]]
    tokens: Mapping[str, int]
    students: Sequence[Student]

    @property
    def bytes(self) -> float:
        """Bytes per token and layer, mean over the layers."""
        return statistics.mean(float(layer["bytes"]) for layer in self.layers)

    @property
    def dimensions(self) -> float:
        """Dimensions that the student learns, mean over the layers; in trellis only those with a bit."""
        return statistics.mean(float(layer["dim"]) for layer in self.layers)

    @property
    def kept(self) -> list[float]:
        return [layer["kept"] for layer in self.layers]

    @property
    def megabytes(self) -> float:
        return sum(float(layer["bytes"]) * self.tokens[layer["teacher"]] for layer in self.layers) / 1e6

    def explained(self, student: Student) -> float | None:
        """Share of the variance of the full states that the student explains, mean over the layers that it learns from.

        It is the share of the stored states that it explains, times the share that storing kept.
        """
        kept = {(layer["teacher"], layer["layer"]): layer["kept"] for layer in self.layers}
        return (
            statistics.mean(kept[pair] * (1 - loss) for pair, loss in student.hidden.items())
            if student.hidden
            else None
        )


def write(runs: Path, name: str, to: Path) -> Path:
    """Write accuracy-against-bytes-table.md and .svg to ``to``; returns the path of the table."""
    found = [one for one in (read_form(runs, name, form) for form in FORMS) if one is not None and one.students]
    if not found:
        raise SystemExit(f"no student of runs '{runs}/{name}-size-*' is finished: python benchmarks/size.py run")
    found.sort(key=lambda one: -one.bytes)
    references = {method: read_students(runs, f"{name}-{method}") for method in REFERENCES}
    references = {method: students for method, students in references.items() if students}
    plot = size_plot.plot(
        [point(one) for one in found], {method: mean(students) for method, students in references.items()}
    )
    (to / "accuracy-against-bytes.svg").write_text(plot + "\n", encoding="utf-8")
    target = to / "accuracy-against-bytes-table.md"
    text = [
        f"    python benchmarks/size.py collect {name}\n",
        main_table(found, references),
        layer_table(found),
        error_line(found),
    ]
    target.write_text("\n".join(text), encoding="utf-8")
    return target


def read_form(runs: Path, name: str, form: str) -> Measured | None:
    file = runs / f"{name}-size-{form}" / "measured.json"
    if not file.exists():
        return None
    read = json.loads(file.read_text(encoding="utf-8"))
    return Measured(form, read["layers"], read["tokens"], read_students(runs, f"{name}-size-{form}"))


def read_students(runs: Path, name: str) -> list[Student]:
    """Finished runs with that name and a seed."""
    seeds = [
        int(path.name.removeprefix(f"{name}-"))
        for path in runs.glob(f"{name}-*")
        if re.fullmatch(f"{re.escape(name)}-\\d+", path.name)
    ]
    return [
        read_student(runs / f"{name}-{seed}", seed)
        for seed in sorted(seeds)
        if (runs / f"{name}-{seed}" / "results.json").exists()
    ]


def read_student(run: Path, seed: int) -> Student:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    splits = [split for split in ("validation", "test") if split in results["scores"]]
    scores = {split: float(results["scores"][split]["accuracy"]) for split in splits}
    hidden = {}
    for curve in read_curves(run / "metrics.jsonl", "steps"):
        match = re.fullmatch(r"hidden/(.+)/(\d+)", curve.name)
        if match:
            layer = results["layer_map"][match[1]][int(match[2]) - 1]
            hidden[match[1], int(layer)] = statistics.mean(curve.values[-LAST_STEPS:])
    return Student(seed, scores, int(results["rows"][splits[-1]]), hidden)


def mean(students: Sequence[Student]) -> float:
    return statistics.mean(student.accuracy for student in students)


def point(form: Measured) -> size_plot.Point:
    return size_plot.Point(
        form.name,
        title(FORMS[form.name]),
        family(FORMS[form.name]),
        form.bytes,
        [one.accuracy for one in form.students],
        form.kept,
    )


def family(form: Form) -> str:
    if form.product is not None:
        return "product quantisation"
    return form.dtype if form.share else f"cut, {form.dtype}" if form.dim else "whole width"


def title(form: Form) -> str:
    if form.share or form.product:
        return f"{family(form)}, 1/{form.share or form.product} of float16"
    return f"PCA to {form.dim}, {form.dtype}" if form.dim else f"{form.dtype}, full width"


def main_table(found: Sequence[Measured], references: Mapping[str, Sequence[Student]]) -> str:
    head = ["form", "bytes per token and layer", "hidden states, MB", "dimensions", "variance kept (least)",
            "seeds", "validation accuracy", "test accuracy",
            "against float16, points", "hidden loss at the end", "explained by the student"]  # fmt: skip
    whole = next((one.students for one in found if one.name == WHOLE), ())
    rows = [
        [title(FORMS[one.name]), f"{one.bytes:.0f}", f"{one.megabytes:.0f}", f"{one.dimensions:.0f}",
         f"{statistics.mean(one.kept):.3f} ({min(one.kept):.3f})",
         *scores(one.students), difference(one.students, whole) if one.name != WHOLE else "",
         spread([statistics.mean(student.hidden.values()) for student in one.students if student.hidden], 3),
         spread([share for share in map(one.explained, one.students) if share is not None], 3)]
        for one in found
    ]  # fmt: skip
    rows += [
        [REFERENCES[method], "0", "0", "0", "", *scores(students), difference(students, whole), "", ""]
        for method, students in references.items()
    ]
    return table(head, rows)


def scores(students: Sequence[Student]) -> list[str]:
    """Cells: seeds, and accuracy by split."""
    cells = [
        spread([student.scores[split] for student in students if split in student.scores], 4)
        for split in ("validation", "test")
    ]
    return [str(len(students)), *cells]


def difference(students: Sequence[Student], whole: Sequence[Student]) -> str:
    """Differences of accuracy in points, per seed that both have finished."""
    there = {student.seed: student.accuracy for student in whole}
    found = [100 * (student.accuracy - there[student.seed]) for student in students if student.seed in there]
    return spread(found, 2, sign="+")


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± sample standard deviation."""
    if not values:
        return ""
    middle = f"{statistics.mean(values):{sign}.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ± {statistics.stdev(values):.{digits}f}"


def layer_table(found: Sequence[Measured]) -> str:
    """Share of variance kept, layer by layer."""
    pairs = [(layer["teacher"], layer["layer"]) for layer in found[0].layers]
    rows = [[title(FORMS[one.name]), *(f"{kept:.3f}" for kept in one.kept)] for one in found]
    return "Variance kept on unseen rows, by layer:\n\n" + table(
        ["form", *(f"{teacher} {layer}" for teacher, layer in pairs)], rows
    )


def error_line(found: Sequence[Measured]) -> str:
    students = [student for one in found for student in one.students]
    accuracy, rows = mean(students), students[0].rows
    error = 100 * math.sqrt(accuracy * (1 - accuracy) / rows)
    return f"The standard error of a single accuracy on {rows:,} rows is {error:.1f} points.\n"
