"""What the students of a sweep cost, and what their teachers would have cost, run in every step."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.recipe.training import FINE_TUNE

if TYPE_CHECKING:
    from kdcache.distill.sweep.cells import SweepStudent

CacheProvenance = Callable[[str | None], Mapping[str, Any]]  # of a cache as a cell names it; empty if not known
_TAIL = 1 << 16  # bytes at the end of metrics.jsonl that hold its last steps


def cost_document(
    students: Mapping[str, Sequence[SweepStudent]], results: Mapping[str, Mapping[str, Any]], of_cache: CacheProvenance
) -> dict[str, Any]:
    """Seconds of all students, and of live teachers that would have read the same texts.

    A resumed student counts with its last process. The teachers' rates are those of the dump, as the provenance of the
    cache has them; ``live_seconds`` is None if the rate of a teacher is not known.

    Args:
        students: the finished ones of each cell.
        results: results.json by a student's name.
        of_cache: gives the provenance of a cache.
    """
    cells: dict[str, dict[str, Any]] = {}
    rates: dict[str, float] = {}
    dumps: dict[tuple[str | None, str], float] = {}
    live: list[float | None] = []
    read_live = 0
    teachers: dict[str, dict[str, Any]] = {}
    for cell, finished in students.items():
        cells[cell] = {"students": len(finished), "seconds": 0.0, "texts": 0}
        for each in finished:
            result = results[each.name]
            texts, with_teachers = _texts(each, result)
            cells[cell]["seconds"] += float(result["seconds"])
            cells[cell]["texts"] += texts
            cells[cell] |= _size(result.get("student", {}))
            teachers |= {name: {**_size(own), **own.get("scores", {})} for name, own in result["teachers"].items()}
            if result["targets"] != "cache":
                continue
            records = {name: _record(of_cache(each.cache), name) for name in result["teachers"]}
            own = {name: _number(record.get("texts_per_second")) for name, record in records.items()}
            rates |= {name: rate for name, rate in own.items() if rate is not None}
            dumps |= {(each.cache, name): _number(record.get("seconds")) or 0.0 for name, record in records.items()}
            read_live += with_teachers
            live.append(None if None in own.values() else sum(with_teachers / rate for rate in own.values() if rate))
    return {
        "students": sum(len(finished) for finished in students.values()),
        "seconds": sum(cell["seconds"] for cell in cells.values()),
        "live_texts": read_live,
        "live_seconds": None if not live or None in live else sum(seconds for seconds in live if seconds is not None),
        "teacher_rates": rates,
        "dump_seconds": sum(dumps.values()),
        "cells": cells,
        "teachers": teachers,
    }


def _size(model: Mapping[str, Any]) -> dict[str, Any]:
    """Latency and parameters of a model, as a student measured them."""
    return {"latency_ms": model.get("latency_ms"), "parameters": model.get("parameters")}


def _texts(student: SweepStudent, result: Mapping[str, Any]) -> tuple[int, int]:
    """Texts that the training read, and those of them in stages that learn from teachers."""
    section = student.recipe.distill
    if not result.get("stages"):
        texts = texts_read(student.run.metrics, section.batch_size)
        return texts, texts
    read = {True: 0, False: 0}
    for own, stage in zip(section.in_stages(), result["stages"], strict=True):
        read[own.method != FINE_TUNE] += int(stage["steps"]) * own.batch_size
    return sum(read.values()), read[True]


def texts_read(metrics: Path, batch_size: int) -> int:
    """Texts that a training read, by the number of its last logged step. A smaller last batch counts as a full one."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if entry["event"] == "steps":
                return int(entry["step"]) * batch_size
    return 0


def _record(provenance: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    teachers = provenance.get("teachers")
    record = teachers.get(name) if isinstance(teachers, Mapping) else None
    return record if isinstance(record, Mapping) else {}


def _number(value: Any) -> float | None:
    """A positive number of a manifest, which may come from somebody else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None
