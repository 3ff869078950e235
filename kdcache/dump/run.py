"""One teacher over all its missing parts: load it, fit its bases, run the parts, free it.

A thread writes each part while the next one runs; at most one part waits. An error of the thread stops the run at the
next part. Parts that were committed before stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.card import subtable
from kdcache.cache.spec import needs_tokens
from kdcache.data.encoding import encode, truncation_note
from kdcache.dump.engine import BackgroundWriter, TextBatches, fit_bases, run_part
from kdcache.progress import counted, format_bytes, format_rate, format_seconds, format_share
from kdcache.runs import home
from kdcache.students.speed import time_forward
from kdcache.teachers.backends import open_backend
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
    backend = open_backend(spec.backend, loaded, tuple(spec.layers), precision=spec.precision, work_dir=home())
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
    tokens_per_batch: int,
    progress: Progress,
    opener: OpenTeacher = open_teacher,
) -> TeacherRun:
    """Run the ``missing`` parts on the backend from ``opener`` and write them.

    Raises NonFiniteError (teacher, text, layer), StorageError, and the backend's errors.
    """
    started = time.perf_counter()
    texts = sum(len(task.part.text_ids) for task in missing)
    tokens = truncated = 0
    with opener(teacher, teachers_dir) as backend:
        bases = _bases(writer, teacher, missing, backend, tokens_per_batch, progress)
        progress.start(f"dump {teacher.name}", texts, "texts")
        written: list[int] = []

        def on_written(count: int) -> None:
            written.append(count)
            progress.advance(0, bytes_done=count)

        with BackgroundWriter("kdcache-write", on_written) as background:
            for task in missing:
                ran = run_piece(
                    teacher, task, writer.texts_of(task.part), backend, bases, tokens_per_batch, progress.advance
                )
                if not truncated:  # noted with the first part, not after hours; the report has the total
                    for line in truncation_note(
                        f"teacher '{teacher.name}'", ran.truncated, len(task.part.text_ids), teacher.spec.max_length
                    ):
                        progress.note(line)
                truncated += ran.truncated
                tokens += ran.token_count
                background.start(_write_part(writer, teacher.name, task, ran))
        progress.finish()
        record = dict(backend.record)
        if missing and not _has_speed(writer, teacher.name):
            record |= measured_record(backend, ran.batches, teachers_dir)
    return TeacherRun(
        teacher.name, len(missing), texts, tokens, sum(written), time.perf_counter() - started, record, truncated
    )


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
        "latency_ms": f"{speed.latency_ms:.3f}",
        "forward_texts_per_second": f"{speed.texts_per_second:.1f}",
    }


def _has_speed(writer: CacheWriter, name: str) -> bool:
    """Whether the published cache that is extended says how fast the teacher is; its record stays."""
    return writer.base is not None and "latency_ms" in subtable(writer.base.provenance, "teachers", name)


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
    teacher: PreparedTeacher,
    task: PartTask,
    texts: Sequence[tuple[str, ...]],
    backend: TeacherBackend,
    bases: Mapping[int, Basis],
    tokens_per_batch: int,
    on_batch: Callable[[int], None],
) -> PieceResult:
    """Run one teacher over the texts of one part. Every engine of a dump runs this. Raises NonFiniteError.

    With out-of-fold teachers, the logits of train texts are those of the bundle that did not see them; pooled vectors
    and hidden states are always those of the teacher, in whose space the bases are.
    """
    batches = text_batches(teacher, texts, task.part.text_ids, tokens_per_batch)
    outputs, hidden = run_part(batches, backend, teacher.spec, task.layers, bases, on_batch)
    if teacher.out_of_fold is not None:
        logits = teacher.out_of_fold.instead_of(outputs.logits, np.asarray(task.part.text_ids))
        outputs = replace(outputs, logits=logits)
    spans = batches.tokens() if task.part.scope == "full" and needs_tokens(teacher.spec.layers) else None
    return PieceResult(outputs if task.outputs else None, spans, hidden, batches)


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


def _write_part(writer: CacheWriter, name: str, task: PartTask, ran: PieceResult) -> Callable[[], int]:
    """The write as a call without arguments."""
    return lambda: writer.write_part(name, task.part, outputs=ran.outputs, tokens=ran.tokens, hidden=ran.hidden)
