"""A dump by a driver and its workers: ``kdcache dump-teachers RECIPE --engine ray``, or ``--to NAME``.

The driver assigns texts to parts, gives out pieces, and publishes. Workers on a shared disk write and commit there.
Without one they send their files to the remote under their digests; the driver keeps the commit records in its own
directory, holds the intent of a push meanwhile, and makes the version at the end. So a dump that was interrupted goes
on from what arrived, and nobody sees half of it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from kdcache.cache import layout
from kdcache.cache.bases import decode_basis, encode_basis
from kdcache.cache.joint import member
from kdcache.cache.selection import Selection, read_local, write_selection
from kdcache.cache.writer import open_writer
from kdcache.dump.dry_run import check_free_space
from kdcache.dump.engines.dispatch import Crew, Drive, Key, Pool, Work
from kdcache.dump.engines.messages import Fit, Fitted, Job, Piece, TeacherJob, Written
from kdcache.dump.engines.worker import driver_versions
from kdcache.dump.provenance import remember_run
from kdcache.dump.run import TeacherRun, lacks_bases, sample
from kdcache.dump.stage import plan_dump, publish_dump
from kdcache.errors import RemoteError
from kdcache.files import remove_file, write_file
from kdcache.progress import format_rate
from kdcache.share.intents import LeaseTiming, hold, wait_until_none
from kdcache.share.keys import check_name, file_key
from kdcache.share.presence import missing_of
from kdcache.share.push import push

if TYPE_CHECKING:
    from kdcache.cache.writer import CacheWriter, PartTask
    from kdcache.dump.stage import DumpJob, DumpReport
    from kdcache.share.push import PushReport
    from kdcache.share.stores.base import Remote

_SHOWN_EVERY = 30.0  # seconds between two lines with the rate of each worker
_ROUNDS = 5  # attempts, each of which ends if the lease expires
Message = Callable[[Key], tuple["Piece | Fit", Mapping[int, bytes]]]


class Engine(Protocol):
    """Where workers run."""

    def pool(self, job: Job, message: Message) -> AbstractContextManager[Pool]:
        """Workers for ``job``, until the block ends; ``message`` makes what a worker gets for a key."""
        ...


@dataclass(frozen=True)
class Target:
    """Where a dump is published: a name on a remote, and its tag. ``url``: as workers open it."""

    remote: Remote
    url: str
    name: str
    tag: str | None = None
    timing: LeaseTiming = field(default_factory=LeaseTiming)


def dump_on_shared_disk(job: DumpJob, engine: Engine) -> DumpReport:
    """Dump with workers that all write to ``job.cache_dir``; continues an interrupted dump of any engine.

    Raises as ``dump_teachers``; KdcacheError if a part fails on several workers, or if no worker is left.
    """
    with member(job.cache_dir) as joint, joint.planning():
        writer = joint.open(job.task_spec, job.settings, store_text=job.store_text)
        missing = plan_dump(writer, job)
        check_free_space(writer, job.teachers, missing)
        token = f"driver-{secrets.token_hex(8)}"
        place = writer.root / layout.STATE / token
        write_file(place, b"")
        shared = replace(_job(job, writer), cache_dir=job.cache_dir.absolute(), identity=joint.identity, token=token)
        try:
            runs = _run(writer, job, shared, missing, engine, recorded=True)
        finally:
            remove_file(place)
        return publish_dump(writer, job, runs)


def dump_to_remote(job: DumpJob, engine: Engine, target: Target) -> tuple[DumpReport, PushReport]:
    """Dump to a remote with workers that share no disk; ``job.cache_dir`` gets texts, bases and commit records.

    Raises as ``dump_on_shared_disk`` and ``push``.
    """
    check_name(target.name)
    remote, timing = target.remote, target.timing
    with hold(remote, "intent", timing) as lease:
        wait_until_none(remote, "mark", timing, lease, job.progress.note)
        with open_writer(job.cache_dir, job.task_spec, job.settings, store_text=job.store_text) as writer:
            plan_dump(writer, job)
            shared = replace(_job(job, writer), remote=target.url)
            runs: list[TeacherRun] = []
            for _ in range(_ROUNDS):
                lease.renew()
                epoch = lease.epoch
                _drop_absent(remote, writer)
                missing = {teacher.name: writer.missing(teacher.name) for teacher in job.teachers}
                runs += _run(writer, job, shared, missing, engine, recorded=False)
                if lease.holds(epoch):
                    break
            else:
                raise RemoteError(
                    f"the dump to '{target.name}' lost its lease {_ROUNDS} times: was the machine suspended?",
                    "Run it again on a machine that is not suspended meanwhile: what was sent is kept.",
                )
            if _is_partial(writer) and read_local(writer.root) is None:
                write_selection(writer.root, Selection({}, job.store_text))
            report = publish_dump(writer, job, runs)
        pushed = push(remote, job.cache_dir, target.name, tag=target.tag, progress=job.progress, timing=timing)
    local = read_local(job.cache_dir)
    if local is not None:
        write_selection(job.cache_dir, local.selection, complete=local.complete, origin=pushed.reference)
    return report, pushed


def _job(job: DumpJob, writer: CacheWriter) -> Job:
    teachers = {
        teacher.name: TeacherJob(writer.contents.teachers[teacher.name], teacher.seed, teacher.trust_remote_code)
        for teacher in job.teachers
    }
    return Job(
        job.task_spec, job.settings, job.store_text, teachers, job.teachers_dir.absolute(),
        job.recipe.dump.shared_batch_tokens, driver_versions(),
    )  # fmt: skip


def _drop_absent(remote: Remote, writer: CacheWriter) -> None:
    """Files that are neither here nor on the remote any more count as missing, durably."""
    away = {path: digest for path, digest in writer.contents.files.items() if not (writer.root / path).exists()}
    absent = set(missing_of(remote, {file_key(digest.sha256): digest.size for digest in away.values()}))
    lost = {path: digest for path, digest in away.items() if file_key(digest.sha256) in absent}
    for path in lost:
        del writer.contents.files[path]
    writer.contents.lost.update(lost)
    writer.journal.add_damaged(lost)


def _is_partial(writer: CacheWriter) -> bool:
    return any(not (writer.root / path).exists() for path in writer.contents.files)


def _run(
    writer: CacheWriter,
    job: DumpJob,
    shared: Job,
    missing: Mapping[str, Sequence[PartTask]],
    engine: Engine,
    *,
    recorded: bool,
) -> tuple[TeacherRun, ...]:
    """Run the missing pieces. ``recorded``: the workers write the commit records."""
    parts = {name: [(task.part.name, bool(task.layers)) for task in tasks] for name, tasks in missing.items() if tasks}
    if not parts:
        return ()
    source = Source(writer, missing)
    unfitted = [teacher.name for teacher in job.teachers if lacks_bases(writer, teacher)]
    tally = _Tally(writer, job, recorded, sum(map(len, parts.values())))
    texts = sum(len(task.part.text_ids) for tasks in missing.values() for task in tasks)
    try:
        with engine.pool(shared, source.message) as pool:
            job.progress.start("dump on workers", texts, "texts")
            drive = Drive(pool, Work(parts, unfitted), tally.take, job.progress.note)
            drive.run()
            job.progress.finish()
            tally.rates(drive.crew)
    finally:
        runs = tally.runs()
        for run in runs:
            remember_run(writer.root, run, shared=True)
    return runs


class Source:
    """Makes the messages for workers from the driver's writer."""

    def __init__(self, writer: CacheWriter, missing: Mapping[str, Sequence[PartTask]]) -> None:
        self._writer = writer
        self._tasks = {Key(name, task.part.name): task for name, tasks in missing.items() for task in tasks}
        self._bases: dict[str, dict[int, bytes]] = {}

    def message(self, key: Key) -> tuple[Piece | Fit, Mapping[int, bytes]]:
        """What a worker gets for a key: its work, and the bases of the teacher."""
        if not key.part:
            return self._fit(key.teacher), {}
        task, contents = self._tasks[key], self._writer.contents
        names = (
            layout.outputs_file(*key),
            layout.tokens_file(*key),
            layout.group_file(*key),
        )
        files = {path: contents.files[path] for path in names if path in contents.files}
        tokens = contents.tokens.get(key.teacher, {}).get(key.part)
        piece = Piece(key.teacher, task, self._writer.texts_of(task.part), tokens, files)
        return piece, self._stored_bases(key.teacher) if task.layers else {}

    def _fit(self, name: str) -> Fit:
        spec = self._writer.contents.teachers[name]
        ids, texts = sample(self._writer, spec.sample_texts)
        return Fit(name, ids, texts, tuple(sorted(spec.layers.keys() - self._writer.layers_with_basis(name))))

    def _stored_bases(self, name: str) -> dict[int, bytes]:
        if name not in self._bases:
            self._bases[name] = {layer: encode_basis(basis) for layer, basis in self._writer.bases(name).items()}
        return self._bases[name]


class _Tally:
    """Takes the results into the writer, counts them, and shows them."""

    def __init__(self, writer: CacheWriter, job: DumpJob, recorded: bool, parts: int) -> None:
        self._writer, self._job, self._recorded, self._left = writer, job, recorded, parts
        self._runs: dict[str, TeacherRun] = {}
        self._shown = time.monotonic()

    def take(self, outcome: Written | Fitted, crew: Crew) -> None:
        if isinstance(outcome, Fitted):
            self._take_bases(outcome)
            return
        contents, name, part = self._writer.contents, outcome.teacher, outcome.part
        contents.files.update(outcome.files)
        if outcome.tokens is not None:
            contents.tokens.setdefault(name, {})[part] = outcome.tokens
        if not self._recorded:
            self._writer.journal.add_teacher_part(name, part, outcome.tokens, outcome.files)
        self._left -= 1
        self._count(outcome)
        values = {"workers": len(crew.now), "parts left": self._left, "failures": crew.failures}
        self._job.progress.advance(outcome.texts, bytes_done=outcome.bytes, **values)
        if time.monotonic() - self._shown > _SHOWN_EVERY:
            self._shown = time.monotonic()
            self.rates(crew)

    def _take_bases(self, fitted: Fitted) -> None:
        spec = self._writer.contents.teachers[fitted.teacher]
        bases = {layer: decode_basis(data, spec.layers[layer], spec.width) for layer, data in fitted.bases.items()}
        self._writer.write_bases(fitted.teacher, bases)
        self._job.progress.note(f"bases of teacher '{fitted.teacher}' fitted")

    def _count(self, one: Written) -> None:
        old = self._runs.get(one.teacher, TeacherRun(one.teacher, 0, 0, 0, 0, 0.0, {}))
        self._runs[one.teacher] = TeacherRun(
            one.teacher, old.parts + 1, old.texts + one.texts, old.tokens + one.token_count, old.bytes + one.bytes,
            old.seconds + one.seconds, one.record, old.truncated + one.truncated,
        )  # fmt: skip

    def rates(self, crew: Crew) -> None:
        """One line per worker."""
        for name, state in sorted({**crew.past, **crew.now}.items()):
            if state.parts or name in crew.now:
                rate = format_rate(state.texts / state.seconds) if state.seconds else "0"
                end = "" if name in crew.now else ", gone"
                failed = f", {state.failures} failures" if state.failures else ""
                self._job.progress.note(f"  {name}: {state.parts:,} parts, {rate} texts/s{failed}{end}")

    def runs(self) -> tuple[TeacherRun, ...]:
        """One run per teacher; seconds are those of all workers together."""
        order = [teacher.name for teacher in self._job.teachers]
        return tuple(self._runs[name] for name in order if name in self._runs)
