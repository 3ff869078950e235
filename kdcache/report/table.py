"""The results table: teachers, the student without teachers, the student; parameters, latency and scores.

Rows are plain values read from ``results.json``, so the table can be drawn anywhere, long after the models are gone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.progress import format_share
from kdcache.report.metrics import standard_error

METRICS = ("accuracy", "macro_f1", "matthews")
METRIC_TITLES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "matthews": "Matthews"}


@dataclass(frozen=True)
class ResultRow:
    """One model. ``latency_ms`` per text: a teacher's is of the dump, a student's of the machine beside the table."""

    model: str
    parameters: int | None
    latency_ms: float | None
    scores: Mapping[str, Mapping[str, float]]  # split -> metric -> value


def result_rows(results: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> list[ResultRow]:
    """Teachers, then the student without teachers, then the student, from the ``results.json`` of the two runs."""
    rows = [
        _row(f"teacher {name}", entry, entry.get("scores", {})) for name, entry in results.get("teachers", {}).items()
    ]
    if "teacher_mixture" in results:
        rows.append(_row("weighted mean of teachers", {}, results["teacher_mixture"].get("scores", {})))
    if baseline is not None:
        rows.append(_row("student without teachers", baseline.get("student", {}), baseline.get("scores", {})))
    title = (
        "student without teachers"
        if results.get("method") == "fine-tune"
        else f"student, {results.get('method', 'distilled')}"
    )
    return [*rows, _row(title, results.get("student", {}), results.get("scores", {}))]


def _row(model: str, entry: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]]) -> ResultRow:
    return ResultRow(model, entry.get("parameters"), entry.get("latency_ms"), scores)


def table(rows: Sequence[ResultRow]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows): metrics of the test split, else of validation, and the validation accuracy."""
    splits = [split for split in ("test", "validation") if any(split in row.scores for row in rows)]
    columns = ["model", "parameters", "ms/text"]
    wanted: list[tuple[str, str]] = []
    for position, split in enumerate(splits):
        for metric in METRICS if position == 0 else METRICS[:1]:
            wanted.append((split, metric))
            columns.append(f"{split} {METRIC_TITLES[metric]}")
    body = [
        [
            row.model,
            millions(row.parameters),
            None if row.latency_ms is None else f"{row.latency_ms:.1f}",
            *(_shown(row.scores.get(split, {}).get(metric)) for split, metric in wanted),
        ]
        for row in rows
    ]
    return columns, body


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; text columns to the left, the rest to the right."""
    aligned = ["---" if position == 0 else "---:" for position in range(len(columns))]
    lines = [columns, aligned, *([("" if value is None else str(value)) for value in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def learned_nothing(scores: Mapping[str, float], rows: int) -> bool:
    """Whether a model's answers say no more about the labels than one answer for every row would.

    The Matthews correlation of a constant answer is 0; of answers that do not depend on the label it spreads around 0
    with a standard deviation of about 1/sqrt(rows), of which two count as nothing. A split that is answered without a
    fault is not judged: with a single class in it the correlation is 0 as well.
    """
    correlation, accuracy = scores.get("matthews"), scores.get("accuracy")
    if correlation is None or accuracy is None or not math.isfinite(correlation) or accuracy == 1:
        return False
    return correlation <= (2 / math.sqrt(rows) if rows else 0.0)


def remarks(results: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> list[str]:
    """One sentence for each model that learned nothing, which its accuracy alone does not show, and for each teacher
    that is worse than the student without teachers.
    """
    split = "test" if "test" in results.get("scores", {}) else "validation"
    rows = int(results.get("labelled_rows", results.get("rows", {})).get(split, 0))
    nothing = [
        f"The {row.model} learned nothing that {rows} rows of {split} show: its Matthews correlation is "
        f"{row.scores[split]['matthews']:.3f}, and one answer for every row has 0. More epochs or another learning "
        "rate may help."
        for row in result_rows(results, baseline)
        if learned_nothing(row.scores.get(split, {}), rows)
    ]
    return nothing if baseline is None else [*nothing, *weak_teachers(results, baseline)]


def weak_teachers(results: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """One sentence for each teacher with a lower accuracy than the student without teachers, on validation if any."""
    alone = baseline.get("scores", {})
    split = "validation" if "validation" in alone else "test"
    bar = alone.get(split, {}).get("accuracy", math.nan)
    return [
        f"Teacher {name} has a lower {split} accuracy ({score:.3f}) than the student without teachers ({bar:.3f}): it "
        "may lower the student's score. kdcache weigh CACHE says whether it helps beside the others; a learning_rate "
        "of its own in [[teachers]] may make it better."
        for name, entry in results.get("teachers", {}).items()
        if (score := entry.get("scores", {}).get(split, {}).get("accuracy", math.nan)) < bar
    ]


def data_notes(results: Mapping[str, Any]) -> list[str]:
    """Notes on the data of these scores: truncated texts and skipped rows."""
    length = results.get("max_length")
    cut = {name: share for name, share in results.get("truncated", {}).get("student", {}).items() if share}
    lines = [f"The student: {_shares(cut)} of the texts are cut at its max_length of {length} tokens."] if cut else []
    teachers = results.get("truncated", {}).get("teachers", {})
    lines += [
        f"Teacher {name}: {format_share(share)} of the texts were cut at its max_length."
        for name, share in teachers.items()
        if share
    ]
    lines += _weights(results.get("teacher_mixture"))
    lines += _speeds(results.get("teachers", {}))
    empty = results.get("empty_rows", {})
    lines += [f"{split}: {count:,} rows without text are left out." for split, count in empty.items() if count]
    return lines


def _speeds(teachers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the speeds of the teachers were measured on, and which are not known; nothing for results of 0.1.0."""
    named = {name: entry["measured_on"] for name, entry in teachers.items() if "measured_on" in entry}
    known = sorted({place for place in named.values() if place is not None})
    lines = [f"The dump measured the teachers' ms/text, on: {'; '.join(known)}."] if known else []
    unknown = [name for name, place in named.items() if place is None]
    if unknown:
        lines.append(
            f"The cache does not say how fast {', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'}; measure it "
            "with: kdcache evaluate TEACHER_DIR --data FILE --label COLUMN --speed"
        )
    return lines


def _weights(mixture: Mapping[str, Any] | None) -> list[str]:
    """The weights of the teachers, where they are not equal."""
    if mixture is None:
        return []
    hot = mixture["teacher_temperatures"]
    shown = ", ".join(
        f"{name} {weight:.4g} (temperature {hot[name]:.4g})" if weight else f"{name} 0 (not read)"
        for name, weight in mixture["teacher_weights"].items()
    )
    fitted = f", fitted to {mixture['fitted_rows']} validation rows" if mixture["fitted_rows"] else ""
    classes = "; other weights for each predicted class" if "teacher_class_weights" in mixture else ""
    return [f"Weights of the teachers{fitted}: {shown}{classes}."]


def _shares(cut: Mapping[str, float]) -> str:
    return ", ".join(f"{format_share(share)} ({name})" for name, share in cut.items())


def verdict(results: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """One honest sentence on whether the distilled student is better than the same one without teachers, by more than
    chance.

    Both are scored on the same rows, so the error of the difference is at most that of two independent samples; one
    seed of each says nothing about the spread over seeds, which the sentence says as well.
    """
    split = "test" if "test" in results.get("scores", {}) else "validation"
    ours, theirs = (run.get("scores", {}).get(split, {}) for run in (results, baseline))
    rows = int(results.get("rows", {}).get(split, 0))
    if "accuracy" not in ours or "accuracy" not in theirs or not rows:
        return "There is no labelled split to compare the students on."
    if learned_nothing(ours, rows):
        return (
            f"The distilled student learned nothing that {rows} rows of {split} show, so it is not compared: its "
            "accuracy is "
            f"{ours['accuracy']:.3f} (the student without teachers: {theirs['accuracy']:.3f}), its Matthews "
            f"correlation {ours['matthews']:.3f}."
        )
    gain = 100 * (ours["accuracy"] - theirs["accuracy"])
    error = 100 * math.hypot(standard_error(ours["accuracy"], rows), standard_error(theirs["accuracy"], rows))
    size = (
        f"{abs(gain):.1f} points of {split} accuracy ({theirs['accuracy']:.3f} -> {ours['accuracy']:.3f}, {rows} rows, "
        f"standard error of the difference {error:.1f})"
    )
    if gain == 0:
        return (
            "The distilled student scores exactly what the same student without teachers does: "
            f"{theirs['accuracy']:.3f} on {rows} rows of {split}."
        )
    if gain > 2 * error:
        return f"The distilled student is better than the same student without teachers by {size}; one seed each."
    if gain > 0:
        return (
            f"The distilled student is ahead of the same student without teachers by {size}: within chance for one "
            "seed each."
        )
    if gain < -2 * error:
        return f"The distilled student is worse than the same student without teachers by {size}; one seed each."
    return (
        f"The distilled student is not better than the same student without teachers: behind by {size}; one seed each."
    )


def millions(parameters: int | None) -> str | None:
    """22713216 -> '22.7M'; below a million in thousands."""
    if parameters is None:
        return None
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.1f}k"


def _shown(score: float | None) -> str | None:
    return None if score is None or math.isnan(score) else f"{score:.4f}"
