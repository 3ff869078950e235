"""How good a student is and where it is wrong: the sections of a page that compare it with its teachers."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.ids import id_list
from kdcache.report import charts
from kdcache.report.html import Block, Cell, Details, Figure, Section, Side, Table, Text, noted, percent
from kdcache.report.intervals import CONFIDENCE, RESAMPLES, Interval, accuracy_difference, bootstrap
from kdcache.report.metrics import accuracy
from kdcache.report.predictions import MEAN, WEIGHTED_MEAN, Answers, SplitPredictions
from kdcache.report.rows import agreement, by_class, calibration, counted, disagreements, most_confused
from kdcache.report.table import METRIC_TITLES, METRICS, millions

if TYPE_CHECKING:
    from kdcache.report.loaded import LoadedRun

MISSING = "kdcache report {} --predict"
_MATRIX = 40  # classes, up to which a confusion matrix is drawn
_PER_CLASS = 40  # classes that are listed
_CONFUSED = 25  # pairs of classes that are listed
_SHOWN = 25  # rows of a kind of disagreement that are listed
_TEXT = 400  # characters of a text that are shown
_AGREEING = 12  # models of an agreement matrix and of reliability curves


@dataclass(frozen=True, eq=False)
class Model:
    """One model of the page; ``answers`` to the rows of the split where they were kept, with their labels and ids."""

    name: str
    role: str
    scores: Mapping[str, Mapping[str, float]]
    parameters: int | None = None
    latency: float | None = None
    labels: np.ndarray | None = None
    answers: Answers | None = None
    fits: bool = True  # whether the answers give the recorded score
    text_ids: np.ndarray | None = None

    @functools.cached_property
    def intervals(self) -> dict[str, Interval]:
        """By metric; empty where the answers were not kept."""
        if self.labels is None or self.answers is None or not self.fits:
            return {}
        return bootstrap(self.labels, self.answers.predictions)


def models_of(loaded: LoadedRun, baseline: LoadedRun | None) -> list[Model]:
    """Teachers, their mean, the student without teachers, the student."""
    results, split, rows = loaded.results, loaded.split, loaded.rows
    found = [
        _model(f"teacher {name}", "teacher", entry, entry.get("scores", {}), split, rows, _answers(rows, name))
        for name, entry in results.get("teachers", {}).items()
    ]
    for name, key in ((WEIGHTED_MEAN, "teacher_mixture"), (MEAN, "teachers_mean")):
        of_mean = results.get(key, {}).get("scores", {})
        if of_mean and len(results.get("teachers", {})) > 1:
            found.append(_model(name, "mean of teachers", {}, of_mean, split, rows, _answers(rows, name)))
            break
    for each, role in ((baseline, "student without teachers"), (loaded, "student")):
        if each is not None:
            own = each.predictions.get(split)
            entry, of_student = each.results.get("student", {}), each.results.get("scores", {})
            answers = None if own is None else own.student
            found.append(_model(each.title, role, entry, of_student, split, own, answers))
    return found


def _model(
    name: str,
    role: str,
    entry: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, float]],
    split: str,
    rows: SplitPredictions | None,
    answers: Answers | None,
) -> Model:
    labels, ids = (None, None) if rows is None or answers is None else (rows.labels, rows.text_ids)
    recorded, fits = scores.get(split, {}).get("accuracy"), True
    if labels is not None and answers is not None and recorded is not None:
        known = labels >= 0
        fits = bool(abs(accuracy(labels[known], answers.predictions[known]) - recorded) < 1e-9)
    return Model(name, role, scores, entry.get("parameters"), entry.get("latency_ms"), labels, answers, fits, ids)


def _answers(rows: SplitPredictions | None, name: str) -> Answers | None:
    return None if rows is None else rows.teachers.get(name)


def score_section(models: Sequence[Model], split: str, notes: Sequence[str]) -> Section:
    """The scores of every model with intervals over rows, and the student's differences from the others."""
    intervals = {model.name: model.intervals for model in models}
    others = ["validation"] if split == "test" and any("validation" in model.scores for model in models) else []
    columns = ["model", *(f"{split} {METRIC_TITLES[metric]}" for metric in METRICS)]
    columns += [*(f"{other} accuracy" for other in others), "parameters", "ms/text"]
    rows = [[model.name, *_scores(model, split, intervals[model.name], others), *_costs(model)] for model in models]
    strong = frozenset(place for place, model in enumerate(models) if model.role == "student")
    table = Table(columns, rows, strong=strong)
    blocks: list[Block] = [table]
    known = [model for model in models if intervals[model.name]]
    if known:
        drawn = [_point(model, intervals[model.name]["accuracy"]) for model in known]
        figure = Figure(
            f"{split.capitalize()} accuracy", charts.score_intervals(drawn, f"{split} accuracy"), _interval_note()
        )
        differences = difference_table(known)
        blocks.append(Side([figure, differences]) if differences is not None else figure)
    return Section("scores", "How good is the student?", [*blocks, *(Text(note, muted=True) for note in notes)])


def _interval_note() -> str:
    return f"with the {CONFIDENCE:.0%} interval over rows ({RESAMPLES:,} bootstrap samples)"


def _costs(model: Model) -> list[Cell]:
    return [millions(model.parameters), None if model.latency is None else f"{model.latency:.1f}"]


def _scores(model: Model, split: str, intervals: Mapping[str, Interval], others: Sequence[str]) -> list[Cell]:
    cells: list[Cell] = []
    for metric in METRICS:
        score, around = model.scores.get(split, {}).get(metric), intervals.get(metric)
        note = "" if around is None else f"{around.low:.3f} – {around.high:.3f}"
        cells.append(None if score is None or np.isnan(score) else noted(f"{score:.4f}", note))
    for other in others:
        score = model.scores.get(other, {}).get("accuracy")
        cells.append(None if score is None or np.isnan(score) else f"{score:.4f}")
    return cells


def _point(model: Model, around: Interval) -> dict[str, Any]:
    return {"model": model.name, "role": model.role, "value": around.value, "low": around.low, "high": around.high}


def difference_table(models: Sequence[Model]) -> Table | None:
    """The last model - each other one on the same rows, in points of accuracy; None where nothing can be compared."""
    *others, ours = models
    rows: list[list[Cell]] = []
    for other in others:
        if ours.answers is None or other.answers is None or not same_rows(ours, other) or ours.labels is None:
            continue
        found = accuracy_difference(ours.labels, ours.answers.predictions, other.answers.predictions)
        if found is None:
            continue
        clear = "above" if found.low > 0 else "below" if found.high < 0 else "within chance"
        interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
        rows.append([f"against {other.name}", noted(f"{100 * found.value:+.1f}", interval), clear])
    return Table([ours.name, "points", ""], rows, left=frozenset((0, 2))) if rows else None


def same_rows(one: Model, two: Model) -> bool:
    """Whether both answered the same texts with the same labels, in one order; False where answers were not kept."""
    if one.labels is None or two.labels is None or one.text_ids is None or two.text_ids is None:
        return False
    return np.array_equal(one.labels, two.labels) and np.array_equal(one.text_ids, two.text_ids)


def cost_section(models: Sequence[Model], split: str, machine: Mapping[str, Any]) -> Section | None:
    """Accuracy against latency and size; None where no latency is known."""
    points = []
    for model in models:
        score, around = model.scores.get(split, {}).get("accuracy"), model.intervals.get("accuracy")
        if model.latency and score is not None:
            bounds = {} if around is None else {"low": around.low, "high": around.high}
            size = f"{millions(model.parameters) or 'unknown number of'} parameters"
            facts = {"latency": model.latency, "parameters": model.parameters, "size": size}
            points.append({"model": model.name, "role": model.role, "value": float(score), **facts, **bounds})
    if not points:
        return None
    where = ", ".join(str(machine[key]) for key in ("device_name", "system") if machine.get(key))
    count = machine.get("threads", "?")
    threads = f"{count} thread{'' if count == 1 else 's'}"
    note = f"measured on {where}, {threads}; the area of a circle is the number of parameters"
    title = f"{split.capitalize()} accuracy against latency and size"
    return Section("cost", "What does it cost?", [Figure(title, charts.cost(points, f"{split} accuracy"), note)])


def error_section(loaded: LoadedRun) -> Section | None:
    """Confusion, classes, and the rows on which student and teachers differ; None without predictions."""
    rows = loaded.rows
    if rows is None or not (rows.labels >= 0).any():
        return None
    names = class_names(loaded, rows)
    counts = counted(rows.labels, rows.student.predictions, len(names))
    blocks: list[Block] = [*_confusion(counts, names), *_classes(counts, names, rows)]
    blocks += _disagreements(loaded, rows, names)
    return Section("errors", "Where is it wrong?", blocks)


def class_names(loaded: LoadedRun, rows: SplitPredictions) -> list[str]:
    """One distinct name for each logit."""
    given = loaded.labels
    names = [given[number] if number < len(given) else str(number) for number in range(rows.logits.shape[1])]
    return (
        [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]
        if len(set(names)) < len(names)
        else names
    )


def _confusion(counts: np.ndarray, names: Sequence[str]) -> list[Block]:
    pairs = most_confused(counts, _CONFUSED)
    listed = Table(
        ["label", "answer of the student", "rows"],
        [[names[pair.label], names[pair.prediction], pair.rows] for pair in pairs],
        left=frozenset((0, 1)),
    )
    if len(names) > _MATRIX:
        return [Text(f"The {len(pairs)} most frequent confusions of {len(names):,} classes:"), listed] if pairs else []
    rows = np.maximum(counts.sum(axis=1), 1)
    cells = [
        {
            "row": names[label],
            "column": names[answer],
            "value": int(counts[label, answer]),
            "shade": float(counts[label, answer] / rows[label]),
        }
        for label in range(len(names))
        for answer in range(len(names))
    ]
    spec = charts.matrix(cells, names, names, ("label", "answer of the student"), digits=",")
    return [Figure("Confusion matrix", spec, "rows of each label, by the student's answer")]


def _classes(counts: np.ndarray, names: Sequence[str], rows: SplitPredictions) -> list[Block]:
    teachers = {name: answers for name, answers in rows.teachers.items() if name in (MEAN, WEIGHTED_MEAN)}
    teachers = teachers or dict(list(rows.teachers.items())[:1])
    of_teacher = {name: by_class(counted(rows.labels, each.predictions, len(names))) for name, each in teachers.items()}
    found = by_class(counts)
    order = sorted(found, key=lambda one: (one.f1 is None, one.f1 or 0.0, one.label))[:_PER_CLASS]
    columns = ["class", "rows", "answered", "recall", "precision", "F1", *(f"F1, {name}" for name in of_teacher)]
    table = Table(
        columns,
        [
            [
                names[one.label],
                f"{one.rows:,}",
                f"{one.predicted:,}",
                *map(percent, (one.recall, one.precision, one.f1)),
            ]
            + [percent(each[one.label].f1) for each in of_teacher.values()]
            for one in order
        ],
    )
    title = (
        f"The {_PER_CLASS} classes with the lowest F1" if len(names) > _PER_CLASS else "Classes, the lowest F1 first"
    )
    return [Text(title), table]


def _disagreements(loaded: LoadedRun, rows: SplitPredictions, names: Sequence[str]) -> list[Block]:
    teachers = {name: each for name, each in rows.teachers.items() if name not in (MEAN, WEIGHTED_MEAN)}
    found = disagreements(rows.labels, rows.student, list(teachers.values()), _SHOWN)
    if not found:
        return []
    whole = max(1, int((rows.labels >= 0).sum()))
    ids = id_list(rows.text_ids)
    texts = loaded.texts([ids[row] for _, shown in found.values() for row in shown])
    every = "every teacher is" if len(teachers) > 1 else "the teacher is"
    no = "no teacher is" if len(teachers) > 1 else "the teacher is not"
    titles = {"student wrong": f"The student is wrong, {every} right", "teachers wrong": f"The student is right, {no}"}
    blocks: list[Block] = []
    for kind, (count, shown) in found.items():
        title = f"{titles[kind]}: {count:,} rows, {percent(count / whole)}"
        if not shown:
            blocks.append(Text(f"{title}."))
            continue
        head = "" if len(shown) == count else f"The {len(shown)} with the surest wrong answers."
        body = [_disagreement(row, rows, teachers, names, texts.get(ids[row])) for row in shown]
        columns = ["text", "label", "student", *teachers]
        table = Table(columns, body, left=frozenset(range(len(columns))), wide=True)
        blocks.append(Details(title, [*([Text(head, muted=True)] if head else []), table]))
    if len(texts) < len({ids[row] for _, shown in found.values() for row in shown}):
        blocks.append(Text("Texts that neither the cache nor the data file has are shown by their id.", muted=True))
    return blocks


def _disagreement(
    row: int, rows: SplitPredictions, teachers: Mapping[str, Answers], names: Sequence[str], text: str | None
) -> list[Cell]:
    shown = f"id {rows.text_ids[row].tobytes().hex()}" if text is None else text
    answers = [
        noted(names[each.predictions[row]], percent(float(each.confidence[row])))
        for each in (rows.student, *teachers.values())
    ]
    return [shown if len(shown) <= _TEXT else shown[: _TEXT - 1] + "…", names[rows.labels[row]], *answers]


def agreement_section(rows: SplitPredictions | None, split: str) -> Section | None:
    """How often models agree, and how far their probabilities can be trusted; None without predictions."""
    if rows is None:
        return None
    answers = {"student": rows.student, **rows.teachers}
    blocks = list(agreement_blocks(rows.labels, answers, split))
    return Section("agreement", "Do the teachers agree, and are they calibrated?", blocks)


def agreement_blocks(labels: np.ndarray, answers: Mapping[str, Answers], split: str) -> Iterator[Block]:
    """The matrix of agreement, reliability curves and calibration errors of the first models."""
    answers = dict(list(answers.items())[:_AGREEING])
    names = list(answers)
    found = {name: calibration(labels, each) for name, each in answers.items()}
    known = {name: each for name, each in found.items() if each is not None}
    blocks: list[Block] = []
    if len(names) > 1:
        shares = agreement(answers)
        least = min(shares.values())
        cells = [
            {"row": one, "column": two, "value": share, "shade": (share - least) / ((1 - least) or 1.0)}
            for (one, two), share in shares.items()
        ]
        spec = charts.matrix(cells, names, names, ("", ""), digits=".1%")
        blocks.append(Figure("Agreement", spec, f"share of the rows of {split} with the same answer"))
    if known:
        note = "above the diagonal a model is underconfident, below it overconfident"
        blocks.append(Figure("Reliability", charts.reliability(known), note))
    if blocks:
        yield Side(blocks)
    if known:
        yield Table(
            ["model", "accuracy", "mean confidence", "calibration error (ECE)"],
            [
                [name, percent(each.accuracy), percent(each.confidence), f"{each.error:.4f}"]
                for name, each in known.items()
            ],
        )
