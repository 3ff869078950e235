"""The README.md of a cache: what it holds and how to use it, for somebody who finds the directory.

Generated, outside the identity, and short: everything in it is in the manifest too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kdcache.cache.spec import LayerSpec, TeacherSpec
    from kdcache.data.task import TaskData
    from kdcache.recipe import Recipe
    from kdcache.teachers.bundle import Bundle, TeacherRecord


def cache_card(recipe: Recipe, task: TaskData, specs: Sequence[TeacherSpec], bundle: Bundle, size: int) -> str:
    """Markdown. ``specs`` are the recipe's teachers, ``size`` the bytes of the cache's files."""
    labels = ", ".join(f"`{name}`" for name in task.label_names)
    columns = ", ".join(f"`{name}`" for name in task.text_columns)
    rows = "\n".join(f"| {split} | {len(examples):,} |" for split, examples in task.splits.items())
    teachers = "\n".join(_teacher_row(spec, bundle.teachers[spec.name]) for spec in specs)
    return f"""\
# {recipe.name}: a cache of teacher targets

What {len(specs)} fine-tuned teacher{"s" if len(specs) > 1 else ""} said of {len(task.texts):,} texts: raw logits, and hidden
states of some layers, for the distillation of small students with kdcache. {size / 1e6:,.1f} MB.

Text columns: {columns}. Labels: {labels}.

| split | examples |
|---|---|
{rows}

| teacher | from | head | layers stored | max. tokens | validation |
|---|---|---|---|---|---|
{teachers}

## Use

    kdcache cache verify PATH
    kdcache distill RECIPE --cache PATH

`manifest.json` lists every file with its sha256. The files open without kdcache too: `hidden/` with zarr, `.arrow` with pyarrow.

## Licences

{_licences(recipe, specs, bundle.teachers)}
"""


def _teacher_row(spec: TeacherSpec, record: TeacherRecord) -> str:
    scores = ", ".join(f"{name} {value:.4f}" for name, value in record.scores.items()) or "–"
    return f"| {spec.name} | {record.source} | {spec.head} | {_layers(spec.layers)} | {spec.max_length} | {scores} |"


def _layers(layers: Mapping[int, LayerSpec]) -> str:
    if not layers:
        return "none: logits only"
    forms: dict[LayerSpec, list[str]] = {}
    for number, spec in layers.items():
        forms.setdefault(spec, []).append(str(number))
    return "; ".join(f"{' '.join(numbers)} ({form.projection} {form.dim} {form.dtype})" for form, numbers in forms.items())


def _licences(recipe: Recipe, specs: Sequence[TeacherSpec], records: Mapping[str, TeacherRecord]) -> str:
    unknown = "not stated in the recipe"
    lines = [f"- this cache: {recipe.licence or unknown}", f"- data: {recipe.data.licence or unknown}"]
    for spec in specs:
        licence = recipe.teacher(spec.name).licence or records[spec.name].licence
        lines.append(f"- teacher {spec.name}: {licence or unknown}")
    return "\n".join(
        [*lines, "", "The texts of the data set are in `text/`: share the cache only where their licence allows it."]
    )
