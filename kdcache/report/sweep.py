"""The table of a sweep: each cell's mean and spread over seeds, and its paired difference from the baseline.

Cells are compared on validation. Test scores appear for the chosen cell and the baseline alone: a reader who sees them
for every cell would choose by them. Everything here is plain data, read from ``results.json``; times are kept apart
from scores, because they differ from run to run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeGuard

from kdcache.progress import counted, format_seconds
from kdcache.report.intervals import paired_difference, spread
from kdcache.report.table import remarks, weak_teachers

SPLIT = "validation"
_LONGEST = 40  # characters of a value in a table
Results = Mapping[str, Any]


@dataclass(frozen=True)
class CellResults:
    """A cell, and what its students reached."""

    name: str
    settings: Mapping[str, Any]  # swept key -> value
    results: Mapping[int, Results]  # seed -> results.json
    failures: Mapping[int, str] = field(default_factory=dict)  # seed -> message
    proposed: bool = False  # by a search

    def scores(self, metric: str, split: str = SPLIT) -> dict[int, float]:
        """Scores by seed, without seeds that have a score in this split that is not finite (``not_finite``)."""
        found = {seed: result["scores"].get(split, {}) for seed, result in sorted(self.results.items())}
        finite = {seed: scores for seed, scores in found.items() if not_finite(scores) is None}
        return {seed: float(scores[metric]) for seed, scores in finite.items() if scores.get(metric) is not None}


def not_finite(scores: Mapping[str, float | None]) -> str | None:
    """The first metric of a split's scores that is NaN or infinite; None where all are finite.

    That is so without labels. With labels it is a student that diverged in its last step (kdcache 0.2): its loss is
    NaN, and its accuracy is that of class 0.
    """
    return next((name for name, score in scores.items() if score is not None and not math.isfinite(score)), None)


def sweep_document(
    name: str,
    cells: Sequence[CellResults],
    *,
    seeds: Sequence[int],
    metric: str,
    baseline: str,
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    """The contents of sweep.json.

    Args:
        name: of the recipe.
        cells: in the order of the recipe.
        seeds: that each cell is trained with.
        metric: what cells are chosen by, on validation.
        baseline: name of the cell that the others are compared with.
        cost: from ``cost_document``.
    """
    base = next(cell for cell in cells if cell.name == baseline)
    whole = [cell for cell in cells if len(cell.scores(metric)) == len(seeds)]
    sign = _sign(metric)
    best = max(whole, key=lambda cell: sign * statistics.fmean(cell.scores(metric).values()), default=None)
    teacher = _best_teacher(cells, metric, sign)
    shown = [cell for cell in (best, base) if cell is not None and cell.scores(metric, "test")]
    return {
        "format": 1,
        "name": name,
        "metric": metric,
        "split": SPLIT,
        "seeds": list(seeds),
        "interval": "95 %, Student's t over seeds, paired by seed",
        "baseline": baseline,
        "chosen": None if best is None else best.name,
        "best_teacher": teacher,
        "cells": [
            {
                "cell": cell.name,
                "settings": dict(cell.settings),
                "proposed": cell.proposed,
                "scores": {str(seed): score for seed, score in cell.scores(metric).items()},
                **_compared(cell, base, teacher, metric, SPLIT),
                "failed": {str(seed): message for seed, message in sorted(cell.failures.items())},
            }
            for cell in cells
        ],
        "test": {cell.name: _compared(cell, base, teacher, metric, "test") for cell in shown},
        "cost": dict(cost),
        "warnings": _warnings(cells, base),
    }


def _warnings(cells: Sequence[CellResults], base: CellResults) -> list[str]:
    """Students without finite scores or that learned nothing, and teachers below the student alone, each once."""
    alone = next(iter(base.results.values()), None)
    alone = alone if alone is not None and alone["method"] == "fine-tune" else None
    found = [
        f"{cell.name}, seed {seed}: {line}"
        for cell in cells
        for seed, result in cell.results.items()
        for line in remarks({**result, "teachers": {}})
    ]
    found += [
        f"{cell.name}, seed {seed}: {metric} on {SPLIT} is not finite, so this student counts as missing: it diverged, "
        "or no row has a label."
        for cell in cells
        for seed, result in cell.results.items()
        if (metric := not_finite(result["scores"].get(SPLIT, {}))) is not None
    ]
    if alone is not None:
        found += [line for cell in cells for result in cell.results.values() for line in weak_teachers(result, alone)]
    return list(dict.fromkeys(found))


def _compared(
    cell: CellResults, base: CellResults, teacher: Mapping[str, Any] | None, metric: str, split: str
) -> dict[str, Any]:
    ours, theirs = cell.scores(metric, split), base.scores(metric, split)
    difference = None if cell is base else paired_difference(ours, theirs)
    return {
        "seeds": len(ours),
        "mean": statistics.fmean(ours.values()) if ours else None,
        "spread": spread(list(ours.values())),
        "difference": None if difference is None else asdict(difference),
        "gap_closed": _gap_closed(ours, theirs, base, None if teacher is None else teacher.get(split), metric),
    }


def _gap_closed(
    ours: Mapping[int, float], theirs: Mapping[int, float], base: CellResults, teacher: float | None, metric: str
) -> float | None:
    """(student - alone) / (best teacher - alone), where the baseline is the student alone and the teacher is better."""
    alone = {result["method"] for result in base.results.values()} == {"fine-tune"}
    seeds = sorted(ours.keys() & theirs.keys())
    if not alone or not seeds or not _is_number(teacher):
        return None
    start, reached = (statistics.fmean(scores[seed] for seed in seeds) for scores in (theirs, ours))
    gap = teacher - start
    if _sign(metric) * gap <= 0:
        return None
    return (reached - start) / gap + 0.0  # no -0.0


def _best_teacher(cells: Sequence[CellResults], metric: str, sign: int) -> dict[str, Any] | None:
    """The teacher with the best validation score of all that a student of the sweep had."""
    found: list[dict[str, Any]] = []
    for cell in cells:
        for result in cell.results.values():
            for name, entry in result.get("teachers", {}).items():
                scores = entry.get("scores", {})
                score = {split: scores.get(split, {}).get(metric) for split in (SPLIT, "test")}
                if _is_number(score[SPLIT]):
                    found.append({"name": name, **score})
    return max(found, key=lambda teacher: sign * float(teacher[SPLIT]), default=None)


def sweep_table(document: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows) of the cells; keys that do not vary are left out."""
    cells = document["cells"]
    keys = varying_keys(document)
    gap = any(cell["gap_closed"] is not None for cell in cells)
    columns = ["cell", *(key.removeprefix("distill.") for key in keys), "seeds", "mean", "spread", "difference", "95%"]
    rows = []
    for cell in cells:
        mark = "*" if cell["cell"] == document["chosen"] else ""
        settings = [short(cell["settings"].get(key)) for key in keys]
        numbers = [cell["seeds"], _score(cell["mean"]), _score(cell["spread"]), *_difference(cell)]
        closed = [_score(cell["gap_closed"], 2)] if gap else []
        rows.append([cell["cell"] + mark, *settings, *numbers, *closed])
    return [*columns, *(["gap closed"] if gap else [])], rows


def varying_keys(document: Mapping[str, Any]) -> list[str]:
    """The swept keys with more than one value."""
    keys = dict.fromkeys(key for cell in document["cells"] for key in cell["settings"])
    return [key for key in keys if len({repr(cell["settings"].get(key)) for cell in document["cells"]}) > 1]


def sweep_lines(document: Mapping[str, Any]) -> list[str]:
    """What the table says: the chosen cell, its test score, failures, and the cost."""
    cells = {cell["cell"]: cell for cell in document["cells"]}
    lines = [
        f"Scores are {document['metric']} on {document['split']}. Differences from {document['baseline']} are paired "
        f"by seed, with a confidence interval over {counted(len(document['seeds']), 'seed')} (Student's t). It does "
        "not include the error of the rows."
    ]
    chosen = cells.get(document["chosen"] or "")
    if chosen is not None:
        settings = settings_text(chosen["settings"], varying_keys(document))
        lines.append(f"Chosen on {document['split']} (*): {chosen['cell']}{f' ({settings})' if settings else ''}.")
    for name, test in document["test"].items():
        role = "the chosen cell" if name == document["chosen"] else "the baseline"
        difference, interval = _difference(test)
        compared = f"; difference {difference}{f' ({interval})' if interval else ''}" if difference else ""
        closed = "" if test["gap_closed"] is None else f"; {test['gap_closed']:z.2f} of the gap to the best teacher"
        lines.append(f"Test {document['metric']} of {role}: {_mean(test)}{compared}{closed}.")
    failed = [(cell, seed, text) for cell in cells.values() for seed, text in cell["failed"].items()]
    lines += [f"Failed: {cell['cell']}, seed {seed}: {text}" for cell, seed, text in failed]
    return [*lines, *cost_lines(document["cost"])]


def cost_lines(cost: Mapping[str, Any]) -> list[str]:
    """What the students took, and what they would have taken with live teachers."""
    students = cost.get("students", 0)
    if not students:
        return []
    lines = [
        f"Cost: {students} students in {format_seconds(cost['seconds'])} of training processes, "
        f"{format_seconds(cost['seconds'] / students)} each."
    ]
    if cost.get("live_seconds") is not None:
        rates = ", ".join(f"{name} {rate:.3g}/s" for name, rate in cost["teacher_rates"].items())
        lines.append(
            f"Live teachers would have read {cost['live_texts']:,} texts: {format_seconds(cost['live_seconds'])} more, "
            f"{format_seconds(cost['live_seconds'] / students)} for each student, at the rates of the dump ({rates}); "
            f"the dump took {format_seconds(cost['dump_seconds'])} once."
        )
    return lines


def short(value: Any) -> str:
    """A value for a table; a path is its last part."""
    text = _text(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key} = {_text(each)}' for key, each in value.items())}}}"
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else str(value)


def settings_text(settings: Mapping[str, Any], keys: Iterable[str]) -> str:
    """The settings of a cell that are set, of ``keys``: ``distill.method = kd, distill.epochs = 4``."""
    return ", ".join(f"{key} = {short(settings[key])}" for key in keys if settings.get(key) is not None)


def _difference(cell: Mapping[str, Any]) -> tuple[str, str]:
    found = cell["difference"]
    if found is None:
        return "", ""
    interval = "" if found["low"] is None else f"{found['low']:+.4f} to {found['high']:+.4f}"
    return f"{found['mean']:+.4f}", interval


def _mean(cell: Mapping[str, Any]) -> str:
    return _score(cell["mean"]) + ("" if cell["spread"] is None else f" ± {cell['spread']:.4f}")


def _score(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:z.{digits}f}"  # z: no -0.00


def _is_number(score: float | None) -> TypeGuard[float]:
    return score is not None and math.isfinite(score)


def _sign(metric: str) -> int:
    """-1 where a smaller score is the better one."""
    return -1 if metric == "loss" else 1
