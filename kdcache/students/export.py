"""Exports a student for use without kdcache and without PyTorch, and measures what that changes.

    kdcache export STUDENT --to onnx --int8

    model.onnx             float32, dynamic batch and length
    model_quantized.onnx   int8 (--int8); optimum's name
    config.json, tokenizer.json, tokenizer_config.json
    README.md              the model card: scores, parity, latency, how to load
    export.json            the same as data

The directory appears only if the graphs give the student's logits, within a tolerance, on real rows.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcache.data.encoding import require_fast
from kdcache.data.task import load_task, read_examples
from kdcache.errors import KdcacheError, MismatchError, ModelError, RecipeError
from kdcache.files import make_directory, publish_directory, sync_tree
from kdcache.progress import counted, format_share
from kdcache.recipe import load_recipe
from kdcache.report.cards import model_card
from kdcache.report.loaded import read_results
from kdcache.report.metrics import scores
from kdcache.report.table import markdown
from kdcache.runs import RunDirectory
from kdcache.students.onnx_student import (
    BATCHES,
    Forward,
    Parity,
    all_logits,
    in_torch,
    latencies,
    open_graph,
    parity,
    quantise,
)
from kdcache.students.parity_rows import Rows, some_rows, synthetic_rows
from kdcache.students.save import ONNX_FILE, export_onnx, load_student, read_record

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe
    from kdcache.students.model import Student
    from kdcache.students.save import StudentRecord

INT8_FILE = "model_quantized.onnx"
REPORT_FILE = "export.json"
FORMAT = 1
TOLERANCE, INT8_TOLERANCE = 1e-4, 0.05
LOADING = """\
import json, numpy, onnxruntime, pathlib, tokenizers

directory = "path/to/this/directory"
tokenizer = tokenizers.Tokenizer.from_file(f"{directory}/tokenizer.json")
session = onnxruntime.InferenceSession(f"{directory}/model.onnx")
labels = json.loads(pathlib.Path(directory, "config.json").read_text(encoding="utf-8"))["id2label"]
rows = tokenizer.encode_batch(["a moving film", "dull from start to end"])  # a pair is a tuple of two texts
fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
inputs = {node.name: numpy.array([getattr(row, fields[node.name]) for row in rows]) for node in session.get_inputs()}
print([labels[str(number)] for number in session.run(["logits"], inputs)[0].argmax(axis=1)])
"""  # classifies two texts; the test executes these lines


@dataclass(frozen=True)
class Variant:
    """One form of the student, measured: PyTorch, ONNX or ONNX int8."""

    name: str
    file: str
    bytes: int
    latency_ms: Mapping[int, float]  # by texts per batch: median of a forward pass
    parity: Parity | None  # against PyTorch; None for PyTorch itself
    scores: Mapping[str, float]  # on the rows; empty without labels


@dataclass(frozen=True)
class ExportReport:
    """The result of an export."""

    directory: Path
    rows: str
    count: int
    variants: tuple[Variant, ...]
    threads: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        variants = [
            {**asdict(one), "latency_ms": {str(n): ms for n, ms in one.latency_ms.items()}} for one in self.variants
        ]
        facts = {"rows": self.rows, "row_count": self.count, "device": "cpu", "threads": self.threads}
        return {"format": FORMAT, "kind": "export", **facts, "variants": variants}

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows: one line per variant."""
        columns = [
            "",
            "MB",
            *(f"ms, batch {size}" for size in BATCHES),
            "largest logit difference",
            "changed predictions",
        ]
        scored = [metric for metric in ("accuracy", "macro_f1") if self.variants[0].scores]
        body = [
            [
                one.name,
                f"{one.bytes / 1e6:.1f}",
                *(f"{one.latency_ms[size]:.2f}" for size in BATCHES),
                "" if one.parity is None else f"{one.parity.largest:.2g}",
                "" if one.parity is None else f"{one.parity.changed} of {one.parity.rows}",
                *(f"{one.scores[metric]:.4f}" for metric in scored),
            ]
            for one in self.variants
        ]
        return [*columns, *scored], body


@dataclass(frozen=True)
class ExportSettings:
    """What to write and what to compare it on.

    ``tolerance``: of ``Parity.relative``, in float32. ``int8_tolerance``: share of predictions that int8 may change.
    """

    int8: bool = False
    data: str | None = None
    text: Sequence[str] | None = None
    label: str | None = None
    tolerance: float = TOLERANCE
    int8_tolerance: float = INT8_TOLERANCE
    trust_remote_code: bool = False


@dataclass(frozen=True)
class _Source:
    """A student's directory with what its run knows of it."""

    directory: Path
    run: RunDirectory | None
    record: StudentRecord | None
    recipe: Recipe | None
    results: Mapping[str, Any]


def export_student(source: Path, target: Path | None, settings: ExportSettings, *, progress: Progress) -> ExportReport:
    """Write the student to ``target`` as ONNX, after comparing it with PyTorch.

    Args:
        source: a run, a student of a sweep, or the directory of a student or of any sequence classifier.
        target: a new directory, or one that an export made; by default ``onnx`` beside the student's directory.
        settings: what to write, and on which rows to compare.
        progress: is told what happens.

    Raises:
        RecipeError: there is no student, or the data do not fit it.
        ModelError: the student cannot be exported or quantised, or the graph gives other logits than PyTorch.
        MismatchError: ``target`` holds something else.
        StorageError: a file cannot be written.
    """
    place = _find(source)
    target = target or (
        place.run.root / "onnx" if place.run else place.directory.with_name(f"{place.directory.name}-onnx")
    )
    _refuse_other(target)
    student = load_student(place.directory, trust_remote_code=settings.trust_remote_code)
    rows = _rows(place, student, settings, progress)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    make_directory(target.parent)
    temporary.mkdir()
    try:
        report = _written(temporary, place, student, rows, settings, progress)
        sync_tree(temporary)
        publish_directory(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return replace(report, directory=target)


def _find(path: Path) -> _Source:
    run = RunDirectory(path)
    if (run.student / "config.json").is_file():
        directory = run.student
    elif (path / "config.json").is_file():
        directory, run = path, RunDirectory(path.absolute().parent)
    elif run.recipe_file.exists() or run.results.exists():
        raise RecipeError(f"run '{path}' has no student yet", f"Distil one: kdcache distill {run.recipe_file}")
    else:
        raise RecipeError(
            f"'{path}' is neither a run nor a student: it has no student/ and no config.json",
            "Name a run (runs/NAME), a student of a sweep (runs/NAME/sweep/STUDENT), or a model's directory.",
        )
    if not run.results.exists() or directory.name != run.student.name:
        return _Source(directory, None, read_record(directory), None, {})
    recipe_file = next((one.recipe_file for one in (run, run.whole) if one.recipe_file.exists()), None)
    recipe = None if recipe_file is None else load_recipe(recipe_file)
    return _Source(directory, run, read_record(directory), recipe, read_results(run))


def _refuse_other(target: Path) -> None:
    if target.exists() and not (target / REPORT_FILE).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise MismatchError(
            f"'{target}' exists and is not an exported student", "Name another --output-dir, or remove it first."
        )


def _rows(place: _Source, student: Student, settings: ExportSettings, progress: Progress) -> Rows:
    """The rows to compare on: ``--data``, else the run's validation rows, else synthetic ones."""
    if settings.data is not None:
        return _rows_of_file(place, student, settings)
    if place.recipe is not None:
        try:
            return _rows_of_run(place.recipe, student)
        except KdcacheError as error:
            progress.note(f"the run's validation rows are not at hand: {error.message}")
    progress.note("the graphs are compared on synthetic token ids: for real rows, give --data FILE")
    return synthetic_rows(student)


def _rows_of_file(place: _Source, student: Student, settings: ExportSettings) -> Rows:
    assert settings.data is not None
    text = settings.text or (place.record.text_columns if place.record else None)
    if text is None:
        raise RecipeError(
            f"model '{place.directory}' has no record of its text columns (kdcache.json)",
            "Name them: --text COLUMN (twice for pairs), and --label COLUMN to score it.",
        )
    label = settings.label or (place.record.label_column if place.record else None)
    declared = place.record is None or place.record.labels_declared is not False
    found = read_examples(settings.data, list(text), label, student.label_names, labels_declared=declared)
    labels = found.labels if label is not None else None
    return some_rows(Path(settings.data).name, student, found.texts, labels)


def _rows_of_run(recipe: Recipe, student: Student) -> Rows:
    task = load_task(recipe.data)
    split = next(name for name in ("validation", "test", "train") if name in task.splits)
    if task.label_names != student.label_names:
        raise MismatchError(f"the classes of {recipe.data.train} are not those of the student")
    examples = task.splits[split]
    texts = [task.texts[bytes(one)] for one in examples.text_ids]
    return some_rows(f"{split} of the run's data", student, texts, examples.labels)


def _written(
    directory: Path, place: _Source, student: Student, rows: Rows, settings: ExportSettings, progress: Progress
) -> ExportReport:
    """Write all files to ``directory``; raises ModelError where a graph gives other logits."""
    columns = len(place.record.text_columns) if place.record else 1
    cure = "Use the student with transformers; docs/export.md lists the models that export."
    progress.note("exporting to ONNX")
    export_onnx(student, columns, directory / ONNX_FILE, cure=cure)
    files = {"ONNX": ONNX_FILE}
    if settings.int8:
        progress.note("quantising to int8")
        quantise(directory / ONNX_FILE, directory / INT8_FILE)
        files["ONNX int8"] = INT8_FILE
    progress.note(f"comparing with PyTorch on {counted(len(rows.encoded), 'row')}: {rows.name}")
    variants = _measured(directory, place.directory, student, rows, files)
    for variant in variants[1:]:
        _refuse_different(variant, settings)
    report = ExportReport(directory, rows.name, len(rows.encoded), variants, torch.get_num_threads())
    _save_config_and_tokenizer(directory, student)
    (directory / "README.md").write_text(_card(place, student, report), encoding="utf-8")
    document = {**report.as_dict(), "student": _origin(place)}
    (directory / REPORT_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return report


def _measured(
    directory: Path, source: Path, student: Student, rows: Rows, files: Mapping[str, str]
) -> tuple[Variant, ...]:
    model, padding = student.model.eval(), int(student.tokenizer.pad_token_id)
    forwards: list[Forward] = [in_torch(model), *(open_graph(directory / file) for file in files.values())]
    reference, *others = all_logits(forwards, rows.encoded, padding)
    times = latencies(forwards, rows.encoded, padding)
    weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    sizes = [weights, *(sum(part.stat().st_size for part in directory.glob(f"{file}*")) for file in files.values())]
    compared = [None, *(parity(own, reference) for own in others)]
    scored = [
        {} if rows.labels is None else {name: float(value) for name, value in scores(rows.labels, own).items()}
        for own in (reference, *others)
    ]
    names, places = ["PyTorch", *files], ["model.safetensors", *files.values()]
    return tuple(Variant(*values) for values in zip(names, places, sizes, times, compared, scored, strict=True))


def _refuse_different(variant: Variant, settings: ExportSettings) -> None:
    """ModelError if the logits of a graph are not those of PyTorch, or int8 changes too many predictions."""
    found = variant.parity
    assert found is not None
    of_rows = f"{found.changed} of {counted(found.rows, 'prediction')} differ"
    if not math.isfinite(found.largest):
        raise ModelError(
            f"{variant.name} gives NaN or infinity where PyTorch does not; nothing was written",
            "Export without --int8." if variant.file == INT8_FILE else "Use the student with PyTorch.",
        )
    if variant.file == INT8_FILE:
        if found.changed > settings.int8_tolerance * found.rows:
            raise ModelError(
                f"{variant.name} differs from PyTorch: {of_rows}, at most {format_share(settings.int8_tolerance)} are "
                f"accepted, and a logit differs by up to {found.largest:.3g}; nothing was written",
                "Export without --int8, or accept more with --int8-tolerance.",
            )
    elif not found.relative <= settings.tolerance:
        raise ModelError(
            f"{variant.name} differs from PyTorch by up to {found.largest:.3g} in a logit, {found.relative:.3g} of the "
            f"largest one, at most {settings.tolerance:g} is accepted, and {of_rows}; nothing was written",
            "Accept more with --tolerance.",
        )


def _save_config_and_tokenizer(directory: Path, student: Student) -> None:
    """What optimum and plain onnxruntime read beside the graph; texts are cut and padded as the student reads them."""
    from tokenizers import Tokenizer

    config = copy.deepcopy(student.model.config)
    config.id2label = dict(enumerate(student.label_names))
    config.label2id = {name: number for number, name in enumerate(student.label_names)}
    config.save_pretrained(directory)
    tokenizer = copy.deepcopy(student.tokenizer)
    require_fast(tokenizer)
    tokenizer.model_max_length = student.max_length
    tokenizer.save_pretrained(directory)
    path = str(directory / "tokenizer.json")
    ready = Tokenizer.from_file(path)
    ready.enable_truncation(student.max_length)
    ready.enable_padding(pad_id=int(student.tokenizer.pad_token_id), pad_token=str(student.tokenizer.pad_token))
    ready.save(path)


def _origin(place: _Source) -> dict[str, Any]:
    """Which student it was: names, no paths of this machine."""
    keys = ("name", "method", "seed", "cache_identity")
    named = {} if place.record is None else {"name": place.record.name, "method": place.record.method}
    return named | {key: place.results[key] for key in keys if place.results.get(key) is not None}


def _card(place: _Source, student: Student, report: ExportReport) -> str:
    known = {"label_names": list(student.label_names), "max_length": student.max_length, **_origin(place)}
    if place.record is not None:
        known["text_columns"] = list(place.record.text_columns)
    known = {**known, **place.results}
    known.setdefault("name", place.directory.name)
    int8 = len(report.variants) > 2
    other = f"`{INT8_FILE}` loads in the same way: it is smaller and faster, and a little less exact.\n" if int8 else ""
    use = f"""\
## ONNX against PyTorch

{markdown(*report.table())}
Compared on {report.count:,} rows ({report.rows}); latency is the median of a forward pass on a CPU with \
{counted(report.threads, "thread")}, without tokenisation.

## Use

With onnxruntime and tokenizers alone:

```python
{LOADING}```

{other}With optimum:
`ORTModelForSequenceClassification.from_pretrained("path/to/this/directory", file_name="{ONNX_FILE}")`.
"""
    tags = ["onnx", *(["int8"] if int8 else [])]
    return model_card(known, place.recipe, library="onnx", tags=tags, use=use)
