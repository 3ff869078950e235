"""The model card of a student: what it is, how it was made, what it scores, how to load it.

The block at its top is the metadata of model hubs: licence, data, base model, and the scores as a ``model-index``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.card import front_matter
from kdcache.progress import listed
from kdcache.report.table import markdown, result_rows, table

if TYPE_CHECKING:
    from kdcache.recipe import Recipe

_IDENTIFIER = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9.+-]*"
)  # an SPDX identifier; longer licences are prose, which YAML would misread
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_METRICS = {  # of results.json, with the type and the name that hubs use
    "accuracy": ("accuracy", "Accuracy"),
    "macro_f1": ("f1", "macro-F1"),
    "matthews": ("matthews_correlation", "Matthews correlation"),
}
_LOAD = """\
## Use

```python
from transformers import pipeline

classify = pipeline("text-classification", "path/to/this/directory")
```
"""
_LOAD_SHARED = """\
## Use

This student has the teachers' shared head, which transformers does not know: load it with
`kdcache evaluate path/to/this/directory --data FILE`, or run `model.onnx` with any ONNX runtime.
"""


def model_card(
    results: Mapping[str, Any],
    recipe: Recipe | None = None,
    *,
    library: str = "transformers",
    tags: Sequence[str] = (),
    use: str = "",
) -> str:
    """Markdown with the metadata that model hubs read. What is not known is left out.

    Args:
        results: the contents of ``results.json``.
        recipe: adds the sources and licences of data and teachers.
        library: what loads the model.
        tags: more tags than those of every student.
        use: sections on how to load it; by default that of a student's directory.
    """
    columns, rows = table(result_rows(results))
    shared = results.get("student", {}).get("head") == "shared"
    parts = [
        front_matter(_metadata(results, recipe, library, tags)),
        f"# {results.get('name', 'student')}",
        "A text classifier distilled with kdcache: its teachers ran once, and it learned from what they said.",
        "\n".join(f"- {key}: {value}" for key, value in _facts(results, recipe).items() if value not in (None, "")),
        *(
            ["## Scores\n\n" + markdown(columns, rows).rstrip()]
            if results.get("scores") or "teachers" in results
            else []
        ),
        (use or (_LOAD_SHARED if shared else _LOAD)).rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(
    results: Mapping[str, Any], recipe: Recipe | None, library: str, tags: Sequence[str]
) -> Mapping[str, Any]:
    licence = str(results.get("licence") or "")
    index = _model_index(results, recipe)
    base = _hub_name(recipe.student.init_from if recipe and recipe.student else None)
    data = _hub_name(recipe.data.train.partition(":")[0] if recipe else None)
    return {
        "library_name": library,
        "pipeline_tag": "text-classification",
        "tags": ["knowledge-distillation", "kdcache", *tags],
        "license": licence.lower() if _IDENTIFIER.fullmatch(licence) else None,
        "base_model": base,
        "datasets": [data] if data else None,
        "metrics": [kind for kind, _ in _METRICS.values()] if index else None,
        "model-index": index,
    }


def _model_index(results: Mapping[str, Any], recipe: Recipe | None) -> list[Mapping[str, Any]] | None:
    """One result per split, as hubs show them beside a model; None without scores."""
    name = str(results.get("name", "student"))
    train = recipe.data.train if recipe else ""
    dataset: dict[str, Any] = {"name": name, "type": _hub_name(train.partition(":")[0]) or name}
    entries = []
    for split, scores in results.get("scores", {}).items():
        metrics = [
            {"type": kind, "value": round(float(scores[metric]), 4), "name": title}
            for metric, (kind, title) in _METRICS.items()
            if math.isfinite(scores.get(metric, math.nan))
        ]
        if metrics:
            task = {"type": "text-classification", "name": "Text classification"}
            entries.append({"task": task, "dataset": dataset | {"split": split}, "metrics": metrics})
    return [{"name": name, "results": entries}] if entries else None


def _facts(results: Mapping[str, Any], recipe: Recipe | None) -> Mapping[str, Any]:
    data = results.get("rows", {})
    return {
        "Method": results.get("method"),
        "Teachers": ", ".join(_teacher(name, recipe) for name in results.get("teachers", {})) or "none",
        "Started from": _basename(str(results.get("student", {}).get("init_from") or "")),
        "Text columns": ", ".join(results.get("text_columns", [])),
        "Labels": listed(results.get("label_names", []), most=50) if results.get("label_names") else "",
        "Longest input": f"{results['max_length']} tokens" if results.get("max_length") else None,
        "Seed": results.get("seed"),
        "Data": _data(data, recipe),
        "Cache": results.get("cache_identity"),
        "Licence": results.get("licence"),
    }


def _teacher(name: str, recipe: Recipe | None) -> str:
    """``bert (google-bert/bert-base-uncased, Apache-2.0)``."""
    section = next((one for one in recipe.teachers if one.name == name), None) if recipe else None
    about = [_basename(section.model), section.licence] if section else []
    shown = ", ".join(part for part in about if part)
    return f"{name} ({shown})" if shown else name


def _data(rows: Mapping[str, int], recipe: Recipe | None) -> str:
    """``train.tsv (MIT): 6,920 train, 872 validation rows``."""
    counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    if recipe is None:
        return f"{counts} rows" if counts else ""
    licence = f" ({recipe.data.licence})" if recipe.data.licence else ""
    return f"{_basename(recipe.data.train)}{licence}" + (f": {counts} rows" if counts else "")


def _hub_name(source: str | None) -> str | None:
    """``source`` if it is a name on a hub; None for paths, and for ``teacher:NAME``."""
    return source if source and _HUB_NAME.fullmatch(source) and not Path(source).exists() else None


def _basename(source: str) -> str:
    """A local path without the directories of this machine; other names as they are."""
    return Path(source).name if Path(source).is_absolute() else source
