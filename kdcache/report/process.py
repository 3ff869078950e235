"""How a student was made: the sections of a page on its losses, on the cache, and on the stages of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.cache.card import stored_as, subtable
from kdcache.errors import DamageError
from kdcache.progress import counted, format_bytes, format_share
from kdcache.report import charts
from kdcache.report.html import Block, Code, Details, Figure, Section, Side, Table, Text, percent
from kdcache.report.loaded import LoadedRun, cache_facts
from kdcache.report.losses import Curve, by_stage, loss_shares, read_curves, scales, weights_of_terms
from kdcache.runs import RunDirectory, read_record

DISTILL = "distill"
_OF_VALIDATION = "accuracy"
_MOST_LINES = 12  # in one chart


def training_section(loaded: LoadedRun, baseline: LoadedRun | None) -> Section | None:
    """The balance of the loss terms, the loss, and the validation accuracy of all trainings."""
    steps = by_stage(read_curves(loaded.run.metrics, "steps"))
    epochs = read_curves(loaded.run.metrics, "epoch")
    blocks: list[Block] = []
    for stage, curves in steps.items():
        if stage.startswith(DISTILL):
            blocks += _balance(stage, curves, weights_of_terms(loaded.results, stage))
    progress = [*_loss(steps), *_accuracy(baseline, epochs)]
    blocks += [Side(progress)] if progress else []
    for stage, curves in steps.items():
        blocks.append(_scales(stage, curves))
    return Section("training", "Are the loss terms balanced?", blocks) if blocks else None


def _balance(stage: str, curves: Sequence[Curve], weights: Mapping[str, float]) -> list[Block]:
    shares = loss_shares(curves, weights)
    if shares is None or len(shares.terms) < 2:
        only = "" if shares is None else f" '{shares.terms[0]}'"
        return [Text(f"{stage}: the loss has one term{only}.")] if shares is not None else []
    whole = ", ".join(f"{name} {percent(share)}" for name, share in shares.of_all().items())
    weighed = ", ".join(f"{name} {weights[name]:g}" for name in shares.terms)
    note = f"{whole} over all steps; weights: {weighed}. Shares of the loss, not of its gradient."
    return [Figure(f"Shares of the loss terms ({stage})", charts.loss_terms(shares), note)]


def _loss(steps: Mapping[str, Sequence[Curve]]) -> list[Block]:
    found = {
        stage: next((curve for curve in curves if curve.name == "loss"), None)
        for stage, curves in steps.items()
        if stage.startswith(DISTILL)
    }
    rows = [
        {"name": stage, "step": step, "loss": value}
        for stage, curve in found.items()
        if curve is not None
        for step, value in charts.thinned(curve.steps, curve.values)
    ]
    if not rows:
        return []
    spec = charts.lines(rows, ("step", "step"), ("loss", "loss"), list(found), points=False)
    return [Figure("Loss of the student", spec, "means of neighbouring steps where there are many")]


def _accuracy(baseline: LoadedRun | None, epochs: Sequence[Curve]) -> list[Block]:
    """Validation accuracy after each epoch: of the students, and of the teachers in their co-finetuning."""
    students = {"student": epochs}
    if baseline is not None:
        students["student without teachers"] = read_curves(baseline.run.metrics, "epoch")
    rows = [
        {"name": name if curve.stage == DISTILL else f"{name}, {curve.stage}", "step": step, "accuracy": value}
        for name, curves in students.items()
        for curve in curves
        if curve.stage.startswith(DISTILL) and curve.name == f"validation/{_OF_VALIDATION}"
        for step, value in charts.thinned(curve.steps, curve.values)
    ]
    blocks = _lines("Validation accuracy of the students", rows)
    rows = [
        {"name": curve.name.removeprefix("validation.").removesuffix(".accuracy"), "step": step, "accuracy": value}
        for curve in epochs
        if not curve.stage.startswith(DISTILL) and curve.name.endswith(".accuracy")
        for step, value in charts.thinned(curve.steps, curve.values)
    ]
    return [*blocks, *_lines("Validation accuracy of the teachers in co-finetuning", rows)]


def _lines(title: str, rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    names = list(dict.fromkeys(str(row["name"]) for row in rows))[:_MOST_LINES]
    shown = [row for row in rows if row["name"] in names]
    return [Figure(title, charts.lines(shown, ("step", "step"), ("accuracy", "accuracy"), names))] if shown else []


def _scales(stage: str, curves: Sequence[Curve]) -> Block:
    rows = [
        [row["term"], *(f"{row[key]:.4g}" for key in ("first", "last", "median", "largest"))] for row in scales(curves)
    ]
    table = Table(["logged value", "first", "last", "median size", "largest"], rows)
    return Details(f"Scale of every logged value: {stage}", [table])


def cache_section(loaded: LoadedRun, notes: Sequence[str]) -> Section | None:
    """What the cache holds and costs, and ``notes`` on the data; None where the student had no teachers."""
    results = loaded.results
    if not results.get("cache_identity") or not results.get("teachers"):
        return None
    blocks: list[Block] = []
    if loaded.cache is None:
        blocks.append(
            Text(
                f"Bytes and variance are not shown: {loaded.no_cache}. kdcache cache info CACHE shows them.", muted=True
            )
        )
    else:
        blocks += _stored(cache_facts(loaded.cache))
    blocks.append(_alignment(results))
    blocks += [Text(line, muted=True) for line in notes]
    return Section("cache", "What does the cache hold, and what does it cost?", blocks)


def _stored(facts: Mapping[str, Any]) -> list[Block]:
    teachers: Mapping[str, Any] = facts["teachers"]
    rows: list[dict[str, Any]] = [
        {"name": name, "part": part, "value": size, "place": place}
        for name, teacher in teachers.items()
        for place, (part, size) in enumerate(_parts(teacher))
        if size
    ]
    places: dict[str, int] = {row["part"]: row["place"] for row in rows}
    layers = sorted((part for part in places if part.startswith("layer")), key=lambda part: (len(part), part))
    parts = [*layers, *sorted(places.keys() - layers, key=places.__getitem__)]
    table = Table(
        ["teacher and layer", "stored as", "bytes per row", "bytes", "variance kept"],
        [
            [f"{name}, layer {layer}", stored_as(stored), f"{stored['row_bytes']:,}", format_bytes(stored["bytes"]),
             _share(stored["kept"])]
            for name, teacher in teachers.items()
            for layer, stored in teacher["layers"].items()
        ],
        left=frozenset((0, 1)),
    )  # fmt: skip
    whole = f"{format_bytes(facts['bytes'])} for {facts['texts']:,} texts and {counted(len(teachers), 'teacher')}"
    seconds = [subtable(facts["provenance"], "teachers", name).get("seconds") for name in teachers]
    made = f"; the teachers ran {sum(map(_number, seconds)):,.0f} s for it" if all(map(_number, seconds)) else ""
    figure = Figure(f"{whole}{made}", charts.bars(rows, list(teachers), parts, "bytes", ".3~s"))
    return [Side([figure, table] if table.rows else [figure])]


def _parts(teacher: Mapping[str, Any]) -> list[tuple[str, int]]:
    layers = [(f"layer {layer}", int(stored["bytes"])) for layer, stored in teacher["layers"].items()]
    known = [*layers, ("logits", int(teacher["bytes_outputs"])), ("tokens", int(teacher["bytes_tokens"]))]
    return [*known, ("other", int(teacher["bytes"]) - sum(size for _, size in known))]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _number(value: Any) -> float:
    """A number of a manifest, which may come from somebody else; 0 for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _alignment(results: Mapping[str, Any]) -> Block:
    coverage, cut = results.get("coverage", {}), results.get("truncated", {}).get("teachers", {})
    layers = results.get("layer_map", {})
    rows = [
        [
            name,
            ", ".join("–" if layer is None else str(layer) for layer in layers.get(name, [])),
            percent(coverage.get(name)),
            "not recorded" if name not in cut else format_share(cut[name]),
        ]
        for name in results["teachers"]
    ]
    columns = ["teacher", "layers by student layer", "student tokens with a target", "texts cut by max_length"]
    return Table(columns, rows, left=frozenset((0, 1)))


def storage_section(run: RunDirectory) -> Section | None:
    """The measurements of ``kdcache plan``, if there are any."""
    if not run.plan.exists():
        return None
    try:
        figures = frontiers(json.loads(run.plan.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamageError(
            f"'{run.plan}' is not readable: {error}", "Delete it, or make it again: kdcache plan RECIPE"
        ) from error
    return Section("storage", "What would other storage formats cost?", [Side(figures)])


def frontiers(plan: Mapping[str, Any]) -> list[Figure]:
    """A chart for each teacher: bytes per row against the share of variance kept, mean over layers."""
    figures = []
    for teacher in dict.fromkeys(layer["teacher"] for layer in plan["layers"]):
        forms: dict[str, list[tuple[float, float]]] = {}
        for form in (form for layer in plan["layers"] if layer["teacher"] == teacher for form in layer["forms"]):
            forms.setdefault(form["form"], []).append((float(form["bytes_per_row"]), float(form["explained"])))
        chosen = (plan.get("recommendation") or {}).get("layers", [])
        recommended = {layer["form"] for layer in chosen if layer["teacher"] == teacher}
        rows = [
            {
                "form": form,
                "family": _family(form),
                "bytes": found[0][0],
                "kept": sum(kept for _, kept in found) / len(found),
                "recommended": form in recommended,
            }
            for form, found in forms.items()
        ]
        title = f"{teacher}: variance kept on unseen rows against bytes"
        figures.append(Figure(title, charts.frontier(rows), "ring: recommended"))
    return figures


def _family(form: str) -> str:
    """``trellis``, ``cut, int8`` or ``whole width``, from the name of a form (``trellis 96``, ``pca 128 int8``)."""
    first, *rest = form.split()
    return "whole width" if first == "none" else f"cut, {rest[-1]}" if len(rest) > 1 else first


def run_section(loaded: LoadedRun) -> Section:
    """The stages with their durations, what the numbers were measured with, and the recipe."""
    stages = read_record(loaded.run).get("stages", {})
    ordered = sorted(stages.items(), key=lambda item: str(item[1]["finished"]))
    blocks: list[Block] = []
    if ordered:
        rows = [[name, str(entry["finished"]), f"{entry['seconds']:,.1f}"] for name, entry in ordered]
        blocks.append(Table(["stage", "finished (UTC)", "seconds"], rows, left=frozenset((0, 1))))
    machine = loaded.results.get("machine", {})
    if machine:
        versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
        facts = (machine.get("device"), machine.get("device_name"), machine.get("system"), versions)
        blocks.append(Text(f"Measured on {', '.join(str(fact) for fact in facts if fact)}.", muted=True))
    if loaded.run.recipe_file.exists():
        blocks.append(Details("Recipe", [Code(loaded.run.recipe_file.read_text(encoding="utf-8"))]))
    return Section("run", "How was it made?", blocks)
