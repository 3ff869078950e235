"""Teachers to add to a cache, given as NAME=DIRECTORY.

deberta=runs/sst2/teachers             a bundle that co-finetuning wrote, with a teacher of that name
deberta=runs/sst2/teachers/deberta     the same, by the teacher's own directory
deberta=models/deberta-sst2            a fine-tuned classifier, which keeps its own head
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache import layout, tables
from kdcache.cache.ids import id_list
from kdcache.cache.spec import check_same_task
from kdcache.errors import ModelError
from kdcache.recipe import TeacherSection
from kdcache.report.metrics import scores
from kdcache.teachers.bundle import is_bundle, read_bundle, write_bundle

if TYPE_CHECKING:
    from kdcache.cache.spec import TaskSpec
    from kdcache.cache.writer import CacheWriter
    from kdcache.progress import Progress
    from kdcache.teachers.bundle import Bundle, TeacherRecord


@dataclass(frozen=True)
class Addition:
    """A teacher in a bundle: ``directory`` holds teachers.json."""

    name: str
    directory: Path
    bundle: Bundle

    @property
    def record(self) -> TeacherRecord:
        return self.bundle.teachers[self.name]


@contextlib.contextmanager
def open_additions(
    given: Mapping[str, Path], task: TaskSpec, max_length: int, progress: Progress, trusted: Collection[str] = ()
) -> Iterator[dict[str, Addition]]:
    """The teachers by name, while the block runs.

    Python code that comes with the teachers in ``trusted`` may run. Raises ModelError, DamageError, and MismatchError
    for another task.
    """
    with tempfile.TemporaryDirectory(prefix="kdcache-") as place:
        additions = {}
        for name, path in given.items():
            directory = _bundle_directory(name, path)
            additions[name] = _of_bundle(name, directory) if directory else _classifier(
                name, path, task, max_length, Path(place) / name, progress, trusted=name in trusted
            )  # fmt: skip
        for name, addition in additions.items():
            subjects = (f"teacher '{name}'", "the cache")
            cure = "Add a teacher of the cache's own task."
            check_same_task(addition.bundle, task, subjects, cure, same_column_names=False)
        yield additions


def _bundle_directory(name: str, path: Path) -> Path | None:
    """The bundle that ``path`` means; None if it is a classifier."""
    if is_bundle(path):
        return path
    if is_bundle(path.parent) and path.name in read_bundle(path.parent).teachers:
        if path.name != name:
            raise ModelError(
                f"'{path}' is teacher '{path.name}', not '{name}'", f"Add it as --teacher {path.name}={path}"
            )
        return path.parent
    if not path.is_dir():
        raise ModelError(
            f"there is no directory '{path}' of teacher '{name}'", "Name a bundle of teachers, or a classifier."
        )
    return None


def _of_bundle(name: str, directory: Path) -> Addition:
    bundle = read_bundle(directory)
    if name not in bundle.teachers:
        raise ModelError(
            f"'{directory}' has no teacher '{name}'; it has: {', '.join(bundle.teachers)}",
            "Name one of these with --teacher.",
        )
    return Addition(name, directory, bundle)


def _classifier(
    name: str, path: Path, task: TaskSpec, max_length: int, place: Path, progress: Progress, *, trusted: bool
) -> Addition:
    """A temporary bundle of this teacher, because fingerprints are those of a bundle's files."""
    from kdcache.teachers.bundle import Bundle
    from kdcache.teachers.registration import save_teachers
    from kdcache.teachers.sources import open_source

    section = TeacherSection(
        name=name, model=str(path.absolute()), head="own", max_length=max_length, trust_remote_code=trusted
    )
    source = open_source(section, max_length, task.label_names, len(task.text_columns))
    if source.note:
        progress.note(source.note)
    bundle = save_teachers(place, Bundle(task.label_names, task.text_columns, {}), None, {name: source}, {})
    write_bundle(place, bundle)
    return Addition(name, place, bundle)


SPLIT = "validation"


def validation_scores(writer: CacheWriter, name: str) -> dict[str, float]:
    """Scores of a teacher by its stored logits; empty without labelled validation rows."""
    contents = writer.contents
    split = contents.splits.get(SPLIT)
    if split is None:
        return {}
    files, spec = writer.files, contents.teachers[name]
    classes = len(contents.task.label_names)
    ids, labels, _ = files.decode(split.file, lambda data: tables.decode_examples(data, split.examples, classes))
    wanted = id_list(ids)
    logits: dict[bytes, np.ndarray] = {}
    for part in writer.parts:
        rows = {text: row for row, text in enumerate(id_list(part.text_ids))}
        here = [text for text in wanted if text in rows]
        if here:
            decode = partial(
                tables.decode_outputs, rows=len(part.text_ids), classes=spec.target.shape[0], pooled=spec.pooled
            )
            outputs = files.decode(layout.outputs_file(name, part.name), decode)
            logits |= {text: np.array(outputs.logits[rows[text]]) for text in here}
    if not wanted or not all(text in logits for text in wanted):
        return {}
    values = scores(labels, np.stack([logits[text] for text in wanted]))
    return {metric: value for metric, value in values.items() if math.isfinite(value)}
