"""One teacher over all its missing parts: load it, fit its bases, run the parts, free it.

Nothing but the teacher itself runs in the calling thread, so a device has no pause between parts. One thread reads and
tokenises the next part, one stores the batches of this part (``engine``), one writes the part before; at most one part
waits for each. An error of a thread stops the run. Parts that were committed before stay.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.card import subtable
from kdcache.cache.spec import needs_tokens
from kdcache.data.encoding import encode, truncation_note
from kdcache.dump.behind import BackgroundWriter
from kdcache.dump.engine import PartRun, TextBatches, fit_bases, layer_encoders, run_part, store_thread
from kdcache.dump.provenance import BATCH, RunCounts, remember_batch, remembered_batch, remembered_run
from kdcache.loading.prefetch import in_background
from kdcache.progress import counted, format_bytes, format_rate, format_seconds, format_share
from kdcache.recipe.storage import TOKENS_PER_BATCH
from kdcache.runs import home
from kdcache.students.speed import time_forward
from kdcache.teachers.backends import open_backend
from kdcache.teachers.backends.memory import FittingBackend, tokens_that_fit
from kdcache.teachers.bundle import load_teacher, parameters_on_disk

if TYPE_CHECKING:
    from kdcache.cache.spec import TeacherSpec
    from kdcache.cache.tokens import Outputs, Tokens
    from kdcache.cache.writer import CacheWriter, PartTask
    from kdcache.codecs.base import Basis, HiddenBlock
    from kdcache.dump.specs import PreparedTeacher
    from kdcache.progress import Progress
    from kdcache.teachers.backends import TeacherBackend
    from kdcache.teachers.teacher import Teacher

_LATENCY = "latency_ms"  # in the record of a run that ended with timing the teacher

OpenTeacher = Callable[["PreparedTeacher", Path], AbstractContextManager["TeacherBackend"]]


@dataclass(frozen=True)
class TeacherRun:
    """The counts of one teacher's run. ``record`` comes from its backend: device, and parity with torch."""

    teacher: str
    parts: int
    texts: int
    tokens: int  # in full parts
    bytes: int
    seconds: float
    record: Mapping[str, str]
    truncated: int = 0  # texts that were cut to max_length
    counted: bool = False  # its texts are in ``provenance.RunCounts``

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        counts = {
            "parts": self.parts,
            "texts": self.texts,
            "texts_truncated": self.truncated,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }
        return {**counts, "seconds": round(self.seconds, 1), **self.record}

    def line(self) -> str:
        """Text for the terminal."""
        rate = self.texts / self.seconds if self.seconds else 0.0
        took = f"{format_seconds(self.seconds)} ({format_rate(rate)} texts/s)"
        cut = f"; {format_share(self.truncated / self.texts)} of the texts cut to max_length" if self.truncated else ""
        return f"{self.teacher}: {counted(self.texts, 'text')}, {format_bytes(self.bytes)} in {took}{cut}"


@contextmanager
def open_teacher(teacher: PreparedTeacher, teachers_dir: Path) -> Iterator[TeacherBackend]:
    """The teacher on the device while the block runs; its memory is freed afterwards."""
    loaded = load_teacher(teachers_dir, teacher.name, trust_remote_code=teacher.trust_remote_code)
    with on_device(loaded, teacher.spec) as backend:
        yield backend


@contextmanager
def on_device(loaded: Teacher, spec: TeacherSpec) -> Iterator[TeacherBackend]:
    """A loaded teacher on the device while the block runs; its memory is freed afterwards."""
    backend = open_backend(
        spec.backend, loaded, tuple(spec.layers), precision=spec.precision, max_length=spec.max_length, work_dir=home()
    )
    try:
        yield backend
    finally:
        backend.close()
        loaded.model.to("meta")  # frees the weights even if modules are still referenced


def run_teacher(
    writer: CacheWriter,
    teacher: PreparedTeacher,
    missing: Sequence[PartTask],
    teachers_dir: Path,
    tokens_per_batch: int | None,
    progress: Progress,
    opener: OpenTeacher = open_teacher,
) -> TeacherRun:
    """Run the ``missing`` parts on the backend from ``opener`` and write them.

    ``tokens_per_batch``: None takes what the teacher's parts so far had, else what fits into the memory of the GPU.

    Raises NonFiniteError (teacher, text, layer), StorageError, and the backend's errors.
    """
    started, counts = time.perf_counter(), RunCounts(writer.root, teacher.name)
    texts = sum(len(task.part.text_ids) for task in missing)
    with opener(teacher, teachers_dir) as opened:
        backend = FittingBackend(opened, teacher.name, progress.note)
        chosen = {} if tokens_per_batch is not None else _chosen_batch(writer, teacher, backend)
        tokens_per_batch = tokens_per_batch or int(chosen.get(BATCH, TOKENS_PER_BATCH))
        bases = _bases(writer, teacher, missing, backend, tokens_per_batch, progress)
        progress.start(f"dump {teacher.name}", texts, "texts")
        ran = _run_parts(writer, teacher, missing, backend, bases, tokens_per_batch, progress, counts)
        progress.finish()
        record = {**backend.record, **chosen}
        if not _has_speed(writer, teacher.name):
            some = ran.last or _texts_of_last_part(writer, teacher, tokens_per_batch)
            record |= measured_record(backend, some, teachers_dir)
    seconds = time.perf_counter() - started
    return TeacherRun(teacher.name, len(missing), texts, ran.tokens, ran.bytes, seconds, record, ran.truncated, True)


@dataclass
class _Parts:
    """What the parts of a teacher came to. ``last``: the batches of the last one."""

    tokens: int = 0
    truncated: int = 0
    bytes: int = 0
    last: TextBatches | None = None


def _run_parts(
    writer: CacheWriter,
    teacher: PreparedTeacher,
    missing: Sequence[PartTask],
    backend: TeacherBackend,
    bases: Mapping[int, Basis],
    tokens_per_batch: int,
    progress: Progress,
    counts: RunCounts,
) -> _Parts:
    """Run and write the parts, each step of a part beside other steps of others."""
    written, found = _Written(progress), _Parts()
    layers = {layer for task in missing for layer in task.layers}
    encoders = layer_encoders(teacher.spec, layers, bases, backend.device)
    with (
        BackgroundWriter("kdcache-write", written.add) as writing,
        store_thread(teacher.spec, backend.device) as store,
        contextlib.closing(_tokenised(writer, teacher, missing, tokens_per_batch)) as tokenised,
    ):
        for task, batches in tokenised:
            part = PartRun(batches, backend, teacher.spec, task.layers, encoders)
            part.run(store, written.advance)
            cut = batches.encoded.truncated_count
            if not found.truncated:  # noted with the first part, not after hours; the report has the total
                reader, texts = f"teacher '{teacher.name}'", len(task.part.text_ids)
                for line in truncation_note(reader, cut, texts, teacher.spec.max_length):
                    progress.note(line)
            found.truncated += cut
            found.tokens += _token_count(teacher, task, batches)
            found.last = batches
            store.start(functools.partial(_hand_over, writing, writer, teacher, task, part, counts))
    written.advance(0)
    found.bytes = written.total
    return found


def _chosen_batch(writer: CacheWriter, teacher: PreparedTeacher, backend: TeacherBackend) -> dict[str, str]:
    """For the provenance: the size of batches of the parts so far, else what fits, remembered before it is used."""
    tokens = remembered_batch(writer.root, teacher.name) or tokens_that_fit(backend, teacher.spec)
    if tokens is None:
        return {}
    remember_batch(writer.root, teacher.name, tokens)
    return {BATCH: str(tokens)}


def measured_record(backend: TeacherBackend, batches: TextBatches, teachers_dir: Path) -> dict[str, str]:
    """Size and speed of a teacher for the provenance, from a few seconds of forward passes as in the dump.

    So ``distill`` can name them without loading the teacher.
    """
    speed = time_forward(
        lambda inputs: backend.run(inputs, (), False).logits,
        batches.encoded,
        batches.pad_token_id,
        backend.device,
        batches.tokens_per_batch,
    )
    return {
        "parameters": str(parameters_on_disk(teachers_dir, batches.teacher)),
        _LATENCY: f"{speed.latency_ms:.3f}",
        "forward_texts_per_second": f"{speed.texts_per_second:.1f}",
    }


def _has_speed(writer: CacheWriter, name: str) -> bool:
    """Whether the published cache that is extended says how fast the teacher is; its record stays."""
    return writer.base is not None and _LATENCY in subtable(writer.base.provenance, "teachers", name)


def lacks_speed(writer: CacheWriter, name: str) -> bool:
    """Whether a teacher ran, and its dump was interrupted before it was timed. False for what is published."""
    ran = remembered_run(writer.root, name)
    published = writer.base is not None and name in writer.base.contents.teachers
    return (ran is not None or not published) and _LATENCY not in (ran or {}) and not _has_speed(writer, name)


def _texts_of_last_part(writer: CacheWriter, teacher: PreparedTeacher, tokens_per_batch: int) -> TextBatches:
    part = writer.parts[-1]
    return text_batches(teacher, writer.texts_of(part), part.text_ids, tokens_per_batch)


class _Written:
    """Bytes that the writing thread has written; the calling thread shows them."""

    def __init__(self, progress: Progress) -> None:
        self.total = self._shown = 0
        self._progress = progress

    def add(self, count: int) -> None:
        """Called by one thread alone."""
        self.total += count

    def advance(self, texts: int) -> None:
        total = self.total
        self._progress.advance(texts, bytes_done=total - self._shown)
        self._shown = total


def _tokenised(
    writer: CacheWriter, teacher: PreparedTeacher, missing: Sequence[PartTask], tokens_per_batch: int
) -> Generator[tuple[PartTask, TextBatches]]:
    """The parts in the teacher's tokens; a thread reads and tokenises the next one."""

    def parts() -> Iterator[tuple[PartTask, TextBatches]]:
        for task in missing:
            yield task, text_batches(teacher, writer.texts_of(task.part), task.part.text_ids, tokens_per_batch)

    return in_background(parts, ahead=1)


def _hand_over(
    writing: BackgroundWriter[int],
    writer: CacheWriter,
    teacher: PreparedTeacher,
    task: PartTask,
    part: PartRun,
    counts: RunCounts,
) -> None:
    """Queue the write of a part whose batches are all stored."""
    ran = _piece_result(teacher, task, part.batches, *part.results())

    def write() -> int:
        counts.add(task.part.name, len(task.part.text_ids), ran.truncated)
        return writer.write_part(teacher.name, task.part, outputs=ran.outputs, tokens=ran.tokens, hidden=ran.hidden)

    writing.start(write)


@dataclass(frozen=True)
class PieceResult:
    """What one teacher gave for one part, as ``CacheWriter.write_part`` takes it."""

    outputs: Outputs | None
    tokens: Tokens | None
    hidden: Mapping[int, HiddenBlock]
    batches: TextBatches  # the texts as they were read

    @property
    def truncated(self) -> int:
        """Texts that were cut to max_length."""
        return self.batches.encoded.truncated_count

    @property
    def token_count(self) -> int:
        """Tokens of a full part with a row per token; else 0."""
        return 0 if self.tokens is None else int(self.tokens.offsets[-1])


def run_piece(
    teacher: PreparedTeacher, task: PartTask, batches: TextBatches, backend: TeacherBackend, bases: Mapping[int, Basis]
) -> PieceResult:
    """Run one teacher over the texts of one part. Every engine with workers runs this. Raises NonFiniteError."""
    ran = run_part(batches, backend, teacher.spec, task.layers, bases, lambda _: None)
    return _piece_result(teacher, task, batches, *ran)


def _piece_result(
    teacher: PreparedTeacher,
    task: PartTask,
    batches: TextBatches,
    outputs: Outputs,
    hidden: Mapping[int, HiddenBlock],
) -> PieceResult:
    """The outputs of a part as they are written.

    With out-of-fold teachers, the logits of train texts are those of the bundle that did not see them; pooled vectors
    and hidden states are always those of the teacher, in whose space the bases are.
    """
    if teacher.out_of_fold is not None:
        logits = teacher.out_of_fold.instead_of(outputs.logits, np.asarray(task.part.text_ids))
        outputs = replace(outputs, logits=logits)
    spans = batches.tokens() if _has_tokens(teacher, task) else None
    return PieceResult(outputs if task.outputs else None, spans, hidden, batches)


def _has_tokens(teacher: PreparedTeacher, task: PartTask) -> bool:
    return task.part.scope == "full" and needs_tokens(teacher.spec.layers)


def _token_count(teacher: PreparedTeacher, task: PartTask, batches: TextBatches) -> int:
    return int(batches.encoded.offsets[-1]) if _has_tokens(teacher, task) else 0


def lacks_bases(writer: CacheWriter, teacher: PreparedTeacher) -> bool:
    """Whether the basis of a layer is missing."""
    return bool(teacher.spec.layers.keys() - writer.layers_with_basis(teacher.name))


def _bases(
    writer: CacheWriter,
    teacher: PreparedTeacher,
    missing: Sequence[PartTask],
    backend: TeacherBackend,
    tokens_per_batch: int,
    progress: Progress,
) -> dict[int, Basis]:
    """The stored bases that are needed; missing ones are fitted on the sample and stored."""
    with writer.fitting(teacher.name):
        bases = dict(writer.bases(teacher.name, {layer for task in missing for layer in task.layers}))
        there = writer.layers_with_basis(teacher.name)
        layers = {layer: spec for layer, spec in teacher.spec.layers.items() if layer not in there}
        if not layers:
            return bases
        ids, texts = sample(writer, teacher.spec.sample_texts)
        progress.start(f"fit bases of {teacher.name}", len(texts), "texts")
        batches = text_batches(teacher, texts, ids, tokens_per_batch)
        fitted = fit_bases(batches, backend, layers, teacher.seed, progress.advance)
        progress.finish()
        writer.write_bases(teacher.name, fitted)
        return bases | fitted


def sample(writer: CacheWriter, size: int) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """The first ``size`` texts of the full parts: a random sample, because parts are filled in seeded order."""
    ids: list[np.ndarray] = []
    texts: list[tuple[str, ...]] = []
    for part in writer.parts:
        if part.scope == "full" and len(texts) < size:
            ids.append(part.text_ids[: size - len(texts)])
            texts += writer.texts_of(part)[: size - len(texts)]
    return np.concatenate(ids), texts


def text_batches(
    teacher: PreparedTeacher, texts: Sequence[tuple[str, ...]], text_ids: np.ndarray, tokens_per_batch: int
) -> TextBatches:
    """``texts``, with ids uint8 [n, 16], in the teacher's tokens."""
    encoded = encode(teacher.tokenizer, texts, teacher.spec.max_length)
    return TextBatches(encoded, text_ids, teacher.pad_token_id, tokens_per_batch, teacher.name)
