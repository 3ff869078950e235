"""A cache as a data set of plain files: texts, labels and the outputs of the teachers, as parquet or JSON lines.

    DIR/data/train-00000-of-00003.parquet     a column per text column, label, logits_<teacher> …
    DIR/README.md                             the card, which names the splits
    DIR/export.json                           what was exported: identity of the cache, columns, counts

``datasets.load_dataset(DIR)`` and pandas read it. Rows come part by part, in the order of the cache, so no more than
one part is in memory; the column ``row`` gives their order in the split. A file appears when it is complete: after an
interruption, the same command writes the missing ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kdcache.cache.card import front_matter, subtable
from kdcache.cache.frame import locate_rows, text_values, values_of_rows
from kdcache.cache.ids import Examples, id_list
from kdcache.cache.selection import Selection
from kdcache.data.labels import other_integers
from kdcache.data.table_files import Column, as_jsonl, as_parquet
from kdcache.errors import DamageError, MismatchError, RecipeError
from kdcache.files import remove_leftovers, write_file, write_stream
from kdcache.progress import listed

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.progress import Progress

TableFormat = Literal["parquet", "jsonl"]
RECORD = "export.json"
_ORDER = ("train", "validation", "test", "transfer")  # of the splits, in reports and cards
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")  # of a licence
_ROWS = 1 << 16  # texts of the parts that share a file, at least


@dataclass(frozen=True)
class ExportChoice:
    """What to export.

    Attributes:
        format: of the files.
        splits: names; None for all.
        teachers: names; None for all.
        values: ``logits`` as they are stored, or ``probabilities``: their softmax at ``temperature``.
        pooled: also the pooled vectors of the teachers that have them.
    """

    format: TableFormat = "parquet"
    splits: tuple[str, ...] | None = None
    teachers: tuple[str, ...] | None = None
    values: Literal["logits", "probabilities"] = "logits"
    temperature: float = 1.0
    pooled: bool = False


@dataclass(frozen=True)
class CacheExport:
    """The result: rows per split, and the columns. ``kept``: files of an earlier call."""

    directory: Path
    rows: Mapping[str, int]
    columns: tuple[str, ...]
    files: int
    kept: int


@dataclass(frozen=True, eq=False)
class _Job:
    cache: Cache
    choice: ExportChoice  # with all names
    columns: tuple[Column, ...]  # after the text columns
    texts: Mapping[bytes, tuple[str, ...]] | None


@dataclass(frozen=True, eq=False)
class _File:
    """A file to write: the rows of ``split`` whose texts are in ``parts``."""

    path: Path
    split: str
    parts: tuple[int, ...]


def export_cache(
    cache: Cache,
    target: Path,
    choice: ExportChoice,
    *,
    texts: Mapping[bytes, tuple[str, ...]] | None = None,
    progress: Progress,
) -> CacheExport:
    """Write the data set to ``target``, a new directory, or one in which the same export was interrupted.

    Args:
        cache: an open cache; only the outputs of the chosen teachers are read.
        target: the directory.
        choice: what to export.
        texts: by id, for a cache without its texts; they win over those of the cache.
        progress: shows rows.

    Raises:
        MismatchError: the cache has no such split or teacher, ``target`` holds something else, or texts are not known.
        DamageError: a file of the cache is missing or damaged.
        StorageError: a file cannot be written.
    """
    job = _job(cache, choice, texts)
    cache.select(Selection(dict.fromkeys(job.choice.teachers or (), ()), text=texts is None))
    splits = {name: cache.examples(name) for name in job.choice.splits or ()}
    rows = {name: len(examples) for name, examples in splits.items()}
    record = _record(job, rows)
    _begin(target, record)
    progress.start("export", sum(rows.values()), "rows")
    files = kept = 0
    for split, examples in splits.items():
        parts, places = locate_rows(cache, split, examples)
        for file in _files(target, job, split, parts):
            files += 1
            kept += file.path.is_file()
            if not file.path.is_file():
                _write(file, job, examples, parts, places)
            progress.advance(int(np.isin(parts, file.parts).sum()))
    progress.finish()
    write_file(target / "README.md", _card(job, rows).encode())
    write_file(target / RECORD, _json({**record, "complete": "yes"}))
    return CacheExport(target, rows, tuple(record["columns"]), files, kept)


def _job(cache: Cache, choice: ExportChoice, texts: Mapping[bytes, tuple[str, ...]] | None) -> _Job:
    in_order = sorted(cache.splits, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    splits, teachers = choice.splits or tuple(in_order), choice.teachers or tuple(cache.teachers)
    for what, names, known in (("split", splits, cache.splits), ("teacher", teachers, tuple(cache.teachers))):
        for name in names:
            if name not in known:
                raise MismatchError(
                    f"cache '{cache.path}' has no {what} '{name}'; it has: {listed(known)}", "Name one of these."
                )
    if not 0 < choice.temperature < np.inf:
        raise RecipeError(f"--temperature is {choice.temperature:g}; a number above 0 was expected", "Such as: 2.0")
    if texts is None and not cache.has_text_here:
        raise MismatchError(
            f"the texts of cache '{cache.path}' are not here", "Give the data that it was made from: --recipe RECIPE"
        )
    classes, pooled = len(cache.task.label_names), {name: cache.teachers[name].pooled for name in teachers}
    if choice.pooled and not any(pooled.values()):
        raise MismatchError(
            f"cache '{cache.path}' has no pooled vectors of {listed(teachers)}", "Dump them with dump.pooled = true."
        )
    grouped = any(cache.examples(split).groups is not None for split in splits)
    columns = [
        Column("label", "string" if other_integers(cache.task.label_names) else "int64"),
        *(Column(f"{choice.values}_{name}", "float32", classes) for name in teachers),
        *(Column(f"pooled_{name}", "float32", width) for name, width in pooled.items() if choice.pooled and width),
        *([Column("group", "string")] if grouped else []),
        Column("row", "int64"),
        Column("text_id", "string"),
    ]
    twice = [column.name for column in columns if column.name in cache.task.text_columns]
    if twice:
        raise MismatchError(
            f"the text column '{twice[0]}' of cache '{cache.path}' has the name of a column of the export",
            "Rename it in the data, and dump them into a new directory.",
        )
    return _Job(cache, replace(choice, splits=splits, teachers=teachers), tuple(columns), texts)


def _record(job: _Job, rows: Mapping[str, int]) -> dict[str, Any]:
    return {
        "format": 1,
        "kind": "cache-export",
        "complete": "no",
        "cache_identity": job.cache.identity,
        "choice": json.loads(json.dumps(asdict(job.choice))),
        "columns": [*job.cache.task.text_columns, *(column.name for column in job.columns)],
        "label_names": list(job.cache.task.label_names),
        "rows": dict(rows),
    }


def _begin(target: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a new export; for an existing one, check that it is the same."""
    path = target / RECORD
    if not path.is_file():
        if target.exists() and (not target.is_dir() or any(not one.name.startswith(".") for one in target.iterdir())):
            raise MismatchError(
                f"'{target}' exists and holds no export of a cache", "Name a new directory with --output-dir."
            )
        write_file(path, _json(record))
        remove_leftovers(target)
        return
    remove_leftovers(target)
    remove_leftovers(target / "data")
    try:
        found = json.loads(path.read_bytes())
        differing = [key for key in record if key != "complete" and found[key] != record[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(f"'{path}' is not readable", "Name a new directory with --output-dir.") from error
    if differing:
        raise MismatchError(
            f"'{target}' holds another export: {listed(differing)} differs", "Name a new directory with --output-dir."
        )


def _files(target: Path, job: _Job, split: str, parts: np.ndarray) -> list[_File]:
    """The files of a split; neighbouring parts share one."""
    together = max(1, _ROWS // job.cache.settings.part_size)
    used = sorted(set(parts.tolist()))
    groups = [tuple(used[first : first + together]) for first in range(0, len(used), together)]
    return [
        _File(target / "data" / f"{split}-{number:05d}-of-{len(groups):05d}.{job.choice.format}", split, group)
        for number, group in enumerate(groups)
    ]


def _write(file: _File, job: _Job, examples: Examples, parts: np.ndarray, places: np.ndarray) -> None:
    tables = (_table(job, examples, parts, places, part) for part in file.parts)
    names = job.cache.task.label_names
    blocks = (
        as_parquet(tables, job.cache.task.text_columns, job.columns, names)
        if job.choice.format == "parquet"
        else as_jsonl(tables)
    )
    write_stream(file.path, blocks, lambda: None)


def _table(
    job: _Job, examples: Examples, parts: np.ndarray, places: np.ndarray, part: int
) -> dict[str, Sequence[Any] | np.ndarray]:
    """The rows of one part, column by column."""
    rows = np.flatnonzero(parts == part)
    rows = rows[np.argsort(places[rows], kind="stable")]
    name, of_part = job.cache.parts[part].name, places[rows]
    ids = id_list(np.asarray(examples.text_ids)[rows])
    texts, teachers = _texts(job, name, ids, of_part), job.choice.teachers or ()
    values = values_of_rows(job.cache, examples, rows, name, of_part, teachers)
    if other_integers(job.cache.task.label_names):  # read again, a number would be the class of that name
        classes = job.cache.task.label_names
        values["label"] = [classes[number] if number >= 0 else None for number in values["label"].tolist()]
    values["group"] = [None if examples.groups is None else examples.groups[row] for row in rows.tolist()]
    for teacher in teachers:
        if job.choice.values == "probabilities":
            values[f"probabilities_{teacher}"] = _softmax(values[f"logits_{teacher}"], job.choice.temperature)
        pooled = job.cache.outputs(teacher, name).pooled if job.choice.pooled else None
        if pooled is not None:
            values[f"pooled_{teacher}"] = pooled[of_part]
    table = text_values(job.cache.task.text_columns, texts)
    return table | {column.name: values[column.name] for column in job.columns}


def _texts(job: _Job, part: str, ids: Sequence[bytes], of_part: np.ndarray) -> list[tuple[str, ...]]:
    if job.texts is None:
        stored = job.cache.texts(part)
        return [stored[row] for row in of_part.tolist()]
    lacking = [one for one in ids if one not in job.texts]
    if lacking:
        raise MismatchError(
            f"{len(lacking):,} texts of {part} are not in the data of the recipe; the first has the id "
            f"{lacking[0].hex()}",
            "Give the data that the cache was made from.",
        )
    return [job.texts[one] for one in ids]


def _softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    shares: np.ndarray = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _card(job: _Job, rows: Mapping[str, int]) -> str:
    """The README.md: metadata that names the files of each split, the columns, and how to read them."""
    cache, ending = job.cache, job.choice.format
    provenance = cache.manifest.provenance
    files = [{"split": split, "path": f"data/{split}-*.{ending}"} for split, count in rows.items() if count]
    licence = str(provenance.get("data_licence") or "")
    head = front_matter(
        {
            "license": licence.lower() if _IDENTIFIER.fullmatch(licence) else None,
            "task_categories": ["text-classification"],
            "tags": ["knowledge-distillation", "kdcache"],
            "configs": [{"config_name": "default", "data_files": files}],
        }
    )
    about = {
        "label": f"class {'name' if other_integers(cache.task.label_names) else 'number'}; empty where there is none",
        "group": "group of the row",
        "row": "number of the row in its split",
        "text_id": "id of the text in the cache",
    }
    softmax = f"softmax of its logits at temperature {job.choice.temperature:g}"
    lines = [f"| `{name}` | text |" for name in cache.task.text_columns]
    for column in job.columns:
        kind, _, teacher = column.name.partition("_")
        meaning = {"logits": "logits", "probabilities": softmax, "pooled": "pooled vector"}.get(kind, "")
        shown = about.get(column.name) or f"{meaning} of teacher {teacher}, {column.width} x float32"
        lines.append(f"| `{column.name}` | {shown} |")
    teachers = [
        f"- teacher {name}: {subtable(provenance, 'teachers', name).get('licence') or 'licence not stated'}"
        for name in job.choice.teachers or ()
    ]
    counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    return f"""\
{head}

# {provenance.get("recipe") or "Teacher outputs"}

The outputs of {len(teachers)} teachers for a text classification task, from a cache of kdcache: {counts} rows.

- Classes: {listed(cache.task.label_names, most=100)}
- Identity of the cache: {cache.identity}
- data: {licence or "licence not stated"}
{chr(10).join(teachers)}

| column | what |
|---|---|
{chr(10).join(lines)}

```python
from datasets import load_dataset

rows = load_dataset("path/to/this/directory", split="{next(iter(rows), "train")}")
```
"""
