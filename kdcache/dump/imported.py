"""Teachers that kdcache does not run: the answers of something else become the logits of a teacher in a cache.

    kdcache cache import CACHE --teacher judge=FILE --as probabilities --column ...

Such a teacher has logits and nothing else. In the manifest it is a teacher with a head of its own and the backend
'imported', so every reader of format 1 takes it. Its fingerprint is that of its answers. A cache has logits of every
teacher for every text: a file that lacks some is refused, and the texts that it lacks can be written for whoever
answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.card import cache_card
from kdcache.cache.ids import ID_BYTES, IdIndex, id_array, id_list, ids_digest
from kdcache.cache.reader import open_cache
from kdcache.cache.spec import IMPORTED, Fingerprints, TargetSpec, TeacherSpec
from kdcache.cache.tokens import Outputs
from kdcache.cache.writer import open_writer
from kdcache.data.task import load_task
from kdcache.dump.additions import validation_scores
from kdcache.dump.provenance import extended_provenance, forget_runs, remember_run
from kdcache.dump.run import TeacherRun
from kdcache.dump.specs import scopes, settings_of, task_spec
from kdcache.dump.stage import write_examples
from kdcache.errors import MismatchError
from kdcache.files import write_file
from kdcache.progress import counted
from kdcache.teachers.bundle import TeacherRecord

if TYPE_CHECKING:
    from kdcache.cache.ids import Examples
    from kdcache.cache.manifest import Manifest
    from kdcache.cache.writer import CacheWriter
    from kdcache.data.answers import Answers
    from kdcache.data.task import TaskData
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe

_TOKENIZER = "{}"  # the format has a tokenizer.json for every teacher


@dataclass(frozen=True, eq=False)
class ImportedTeacher:
    """Answers with their source.

    ``source`` and ``licence`` are stated by the user; ``lacking`` is a file for the texts without an answer.
    """

    answers: Answers
    source: str
    licence: str = ""
    lacking: Path | None = None


def imported_spec(name: str, imported: ImportedTeacher, classes: int) -> TeacherSpec:
    """What the manifest says of the teacher. Equal answers have equal fingerprints, whatever file they came in."""
    answers = imported.answers
    settings = hashlib.sha256(f"{answers.kind}\0{answers.smoothing:g}".encode()).hexdigest()
    none = hashlib.sha256(_TOKENIZER.encode()).hexdigest()
    return TeacherSpec(
        name=name,
        head="own",
        fingerprints=Fingerprints(weights=answers.fingerprint, config=settings, head=none, tokenizer=none),
        depth=0,
        width=1,
        max_length=1,
        truncation="none",
        backend=IMPORTED,
        precision=answers.kind,
        target=TargetSpec(shape=(classes,)),
        pooled=None,
        sample_texts=0,
    )


def write_answers(writer: CacheWriter, name: str, imported: ImportedTeacher) -> TeacherRun:
    """Write the missing parts of the teacher. Raises MismatchError if the cache has another teacher of that name."""
    started = time.perf_counter()
    answers, index = imported.answers, IdIndex(imported.answers.ids)
    spec = imported_spec(name, imported, len(writer.contents.task.label_names))
    missing = writer.declare_teacher(spec, _TOKENIZER)
    texts = written = 0
    for task in missing:
        places = index.find(task.part.text_ids)
        assert (places >= 0).all(), "texts without an answer are refused before anything is written"
        logits = np.ascontiguousarray(answers.logits[places])
        written += writer.write_part(name, task.part, outputs=Outputs(logits), tokens=None, hidden={})
        texts += len(logits)
    run = TeacherRun(name, len(missing), texts, 0, written, time.perf_counter() - started, {"imported": answers.kind})
    if missing:
        extra = len(answers.ids) - int((index.find(_all_ids(writer)) >= 0).sum())
        record: Any = {"import": {**answers.record, "texts_not_in_cache": extra}}
        remember_run(writer.root, replace(run, record=record))
    return run


def imported_record(writer: CacheWriter, name: str, imported: ImportedTeacher) -> TeacherRecord:
    """Source, licence and validation scores, as the provenance has them of every teacher."""
    spec = writer.contents.teachers[name]
    return TeacherRecord(
        head="own",
        adapter=False,
        depth=spec.depth,
        width=spec.width,
        max_length=spec.max_length,
        source=imported.source,
        revision=None,
        licence=imported.licence,
        fingerprints=spec.fingerprints,
        scores=validation_scores(writer, name),
    )


def refuse_missing(
    name: str, imported: ImportedTeacher, cache_dir: Path, writer: CacheWriter, task: TaskData | None
) -> None:
    """MismatchError if the answers lack texts of the cache, or of ``task``; writes these to ``imported.lacking``."""
    new = () if task is None else task.texts
    lacking = _lacking(imported, np.unique(np.concatenate([_all_ids(writer), id_array(new)]), axis=0))
    if not len(lacking):
        return
    cache = open_cache(cache_dir, incomplete=True)
    splits = {split: cache.examples(split) for split in cache.splits} | ({} if task is None else task.splits)
    texts = {**_texts_of(writer, lacking), **({} if task is None else task.texts)}
    _refuse(name, imported, lacking, splits, texts, cache.task.text_columns)


def _texts_of(writer: CacheWriter, ids: np.ndarray) -> dict[bytes, tuple[str, ...]]:
    """The texts with these ids; empty where the cache does not store texts, or they were not pulled."""
    wanted, texts = set(id_list(ids)), dict[bytes, tuple[str, ...]]()
    for part in writer.parts if writer.contents.has_text else ():
        here = id_list(part.text_ids)
        if not wanted.isdisjoint(here):
            with contextlib.suppress(MismatchError):  # not pulled
                texts |= {one: text for one, text in zip(here, writer.texts_of(part), strict=True) if one in wanted}
    return texts


def _all_ids(writer: CacheWriter) -> np.ndarray:
    parts = [np.asarray(part.text_ids) for part in writer.parts]
    return np.unique(np.concatenate([np.zeros((0, ID_BYTES), np.uint8), *parts]), axis=0)


def _lacking(imported: ImportedTeacher, ids: np.ndarray) -> np.ndarray:
    return ids[IdIndex(imported.answers.ids).find(ids) < 0]


def _refuse(
    name: str,
    imported: ImportedTeacher,
    lacking: np.ndarray,
    splits: Mapping[str, Examples],
    texts: Mapping[bytes, tuple[str, ...]],
    columns: Sequence[str],
) -> None:
    """Raise MismatchError with the number of texts per split and the first one."""
    index = IdIndex(lacking)
    of_split = {
        split: len(np.unique(own[own >= 0])) for split, rows in splits.items() for own in [index.find(rows.text_ids)]
    }
    shown = ", ".join(f"{split} {count:,}" for split, count in of_split.items() if count) or "no split"
    first = id_list(lacking[:1])[0]
    text = f"the first: {' | '.join(texts[first])[:60]!r}" if first in texts else f"the first has the id {first.hex()}"
    hint = "Answer these texts too; a teacher of a cache has logits for every text. --write-missing FILE lists them."
    if imported.lacking is not None and texts:
        lines = [
            (json.dumps(dict(zip(columns, texts[one], strict=True)), ensure_ascii=False) + "\n").encode()
            for one in id_list(lacking)
            if one in texts
        ]
        write_file(imported.lacking, lines)
        hint = f"Answer the texts in '{imported.lacking}', add them to the file, and run the same command again."
    raise MismatchError(
        f"{imported.source} has no answer of '{name}' for {counted(len(lacking), 'text')} of the cache ({shown}); "
        f"{text}",
        hint,
    )


def import_into_new_cache(
    cache_dir: Path,
    recipe: Recipe,
    name: str,
    imported: ImportedTeacher,
    *,
    progress: Progress,
    task: TaskData | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> tuple[Manifest, TeacherRun]:
    """Make a cache of the recipe's data with this teacher alone. Raises as ``extend_cache``."""
    task = task or load_task(recipe.data)
    for line in task.counts.notes():
        progress.note(line)
    texts = scopes(task, recipe.dump.hidden_transfer)
    known = {one: text for group in (texts.full, texts.evaluation, texts.transfer) for one, text in group.items()}
    lacking = _lacking(imported, id_array(sorted(known)))
    if len(lacking):
        _refuse(name, imported, lacking, task.splits, known, task.text_columns)
    settings = settings_of(recipe.dump, len(known), cache_dir)
    with open_writer(cache_dir, task_spec(task), settings) as writer:
        writer.add_texts(texts.full, texts.evaluation, texts.transfer)
        run = write_answers(writer, name, imported)
        write_examples(writer, task)
        about = {"recipe": recipe.name, "licence": recipe.licence, "data_licence": recipe.data.licence}
        records = {name: imported_record(writer, name, imported)}
        record = extended_provenance({}, records, cache_dir, provenance or {}) | about
        record["text_ids"] = ids_digest(part.text_ids for part in writer.parts)
        manifest = writer.publish(record, card=cache_card)
        forget_runs(cache_dir, manifest.contents.teachers)
    return manifest, run
