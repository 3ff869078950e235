"""A worker of a dump: loads a teacher, runs pieces, and writes each to the shared disk or sends it to the remote.

A teacher is loaded with the first piece that needs it and kept until a piece of another teacher comes. Pieces run one
at a time; while one is written or sent, the next one runs. Nothing here knows which engine calls it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.cache.bases import decode_basis, encode_basis
from kdcache.cache.contents import Contents, PartInfo
from kdcache.cache.joint import Joint, SupersededError
from kdcache.cache.journal import Journal
from kdcache.cache.spec import differing
from kdcache.cache.writer import CacheWriter
from kdcache.dump.engine import fit_bases
from kdcache.dump.engines.messages import About, Failed, Fit, Fitted, Outcome, Piece, Written
from kdcache.dump.provenance import library_versions
from kdcache.dump.run import PieceResult, on_device, run_piece, text_batches
from kdcache.dump.specs import PreparedTeacher
from kdcache.errors import (
    DamageError,
    KdcacheError,
    LockedError,
    MismatchError,
    ModelError,
    NonFiniteError,
    RemoteAccessError,
    StorageError,
    first_line,
)
from kdcache.files import remove_file, write_file
from kdcache.locks import attempt
from kdcache.share.keys import file_key
from kdcache.share.parallel import Stop, for_each
from kdcache.share.transfer import send_file
from kdcache.teachers.backends.memory import FittingBackend
from kdcache.teachers.bundle import load_teacher
from kdcache.teachers.folds import folds_of_cache

if TYPE_CHECKING:
    from kdcache.codecs.base import Basis
    from kdcache.dump.engine import TextBatches
    from kdcache.dump.engines.messages import Job
    from kdcache.files import FileDigest
    from kdcache.share.stores.base import Remote
    from kdcache.teachers.backends import TeacherBackend

_SENDERS = 8  # threads that send the files of a part
_FOR_GOOD = (
    StorageError,
    MismatchError,
    DamageError,
    ModelError,
    LockedError,
    RemoteAccessError,
)  # of the worker's machine


class Worker:
    """One worker. ``check`` and ``do`` may be called from two threads."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._name = f"{socket.gethostname()}/{os.getpid()}"
        self._compute, self._entry = threading.Lock(), threading.Lock()
        self._life = contextlib.ExitStack()  # until the process ends
        self._loaded = contextlib.ExitStack()
        self._teacher: tuple[PreparedTeacher, TeacherBackend] | None = None
        self._bases: dict[int, Basis] = {}
        self._remote: Remote | None = None
        self._ready = False
        self._sent: set[str] = set()

    def check(self) -> Outcome:
        """Whether this worker has the driver's libraries, sees its disk or remote, and may write there."""
        return _reported(self._about)

    def do(self, work: Piece | Fit, bases: Mapping[int, bytes] | None = None) -> Outcome:
        """Run a piece, with the bases of its teacher as their files have them; or fit bases. Errors are returned."""
        if isinstance(work, Fit):
            return _reported(lambda: self._fit(work))
        return _reported(lambda: self._run(work, bases or {}))

    def close(self) -> None:
        """Free the teacher and leave the shared directory."""
        self._loaded.close()
        self._life.close()

    def _about(self) -> About:
        self._enter()
        return About(self._name)

    def _enter(self) -> None:
        """Once per process: a restarted worker has lost what it knew."""
        with self._entry:
            if self._ready:
                return
            _check_versions(self._job.versions)
            if not self._job.teachers_dir.is_dir():
                raise MismatchError(
                    f"there is no teachers' directory '{self._job.teachers_dir}' on this machine",
                    "Put the teachers at the same path on every machine.",
                )
            if self._job.cache_dir is not None:
                self._share_disk(self._job.cache_dir)
            elif self._job.remote is not None:
                from kdcache.share.stores.registry import open_remote

                self._remote = open_remote(self._job.remote)
                next(iter(self._remote.list("refs/")), None)  # it answers, and the credentials are right
            self._ready = True

    def _share_disk(self, root: Path) -> None:
        state = root / layout.STATE
        if not (state / self._job.token).is_file():
            raise MismatchError(
                f"'{root}' on this machine is not the driver's directory: its disk is not shared",
                "Write to a disk that all machines share, or to a remote with --to NAME.",
            )
        probe = state / f"probe-{secrets.token_hex(4)}"
        write_file(probe, b"")
        remove_file(probe)
        if not self._life.enter_context(attempt(state / "lock", shared=True)):
            raise LockedError(f"cache '{root}' is being written by a process that does not share the work")

    def _fit(self, fit: Fit) -> Fitted:
        began = time.perf_counter()
        self._enter()
        with self._compute:
            teacher, backend = self._load(fit.teacher)
            batches = text_batches(teacher, fit.texts, fit.text_ids, self._job.tokens_per_batch)
            layers = {layer: teacher.spec.layers[layer] for layer in fit.layers}
            fitted = fit_bases(batches, backend, layers, teacher.seed, lambda _: None)
        encoded = {layer: encode_basis(basis) for layer, basis in fitted.items()}
        return Fitted(fit.teacher, encoded, time.perf_counter() - began)

    def _run(self, piece: Piece, bases: Mapping[int, bytes]) -> Written:
        self._enter()
        batches = self._tokenised(piece)
        with self._compute:
            began = time.perf_counter()
            teacher, backend = self._load(piece.teacher)
            batches = batches or text_batches(
                teacher, piece.texts, piece.task.part.text_ids, self._job.tokens_per_batch
            )
            if piece.task.layers and not self._bases:
                specs, width = teacher.spec.layers, teacher.spec.width
                self._bases = {layer: decode_basis(data, specs[layer], width) for layer, data in bases.items()}
            ran = run_piece(teacher, piece.task, batches, backend, self._bases)
            record, seconds = dict(backend.record), time.perf_counter() - began
        files, count, size = self._write(piece, ran)
        return Written(
            piece.teacher, piece.task.part.name, count, files, len(piece.texts), ran.truncated, ran.token_count, size,
            seconds, record,
        )  # fmt: skip

    def _tokenised(self, piece: Piece) -> TextBatches | None:
        """The piece in the teacher's tokens, made while another piece runs; None if another teacher is loaded."""
        loaded = self._teacher
        if loaded is None or loaded[0].name != piece.teacher:
            return None
        return text_batches(loaded[0], piece.texts, piece.task.part.text_ids, self._job.tokens_per_batch)

    def _load(self, name: str) -> tuple[PreparedTeacher, TeacherBackend]:
        """The teacher on the device; frees the one before."""
        if self._teacher is not None and self._teacher[0].name == name:
            return self._teacher
        self._teacher, self._bases = None, {}
        self._loaded.close()
        asked = self._job.teachers[name]
        loaded = load_teacher(self._job.teachers_dir, name, trust_remote_code=asked.trust_remote_code)
        if loaded.fingerprints != asked.spec.fingerprints:
            raise MismatchError(
                f"teacher '{name}' in '{self._job.teachers_dir}' on this machine is not the driver's: "
                f"{differing(asked.spec.fingerprints, loaded.fingerprints)}",
                "Copy the driver's teachers to the same path on this machine.",
            )
        folds = folds_of_cache(self._job.teachers_dir, name, asked.spec.folds)
        prepared = PreparedTeacher(asked.spec, loaded.tokenizer, "", asked.seed, asked.trust_remote_code, folds)
        backend = self._loaded.enter_context(on_device(loaded, asked.spec))
        self._teacher = prepared, FittingBackend(backend, name, lambda _: None)  # the record has what it would say
        return self._teacher

    def _write(self, piece: Piece, ran: PieceResult) -> tuple[dict[str, FileDigest], int | None, int]:
        """Write the piece's files where they belong; returns its commit record and the bytes written."""
        part = piece.task.part
        contents = Contents(
            self._job.task, self._job.settings, self._job.has_text,
            parts=[PartInfo(part.name, part.scope, len(part.text_ids))],
            teachers={piece.teacher: self._job.teachers[piece.teacher].spec},
            tokens={piece.teacher: {} if piece.tokens is None else {part.name: piece.tokens}},
            files=dict(piece.files),
        )  # fmt: skip
        with self._place(contents) as (writer, send):
            writer.give_ids(part)
            size = writer.write_part(piece.teacher, part, outputs=ran.outputs, tokens=ran.tokens, hidden=ran.hidden)
            files = {path: digest for path, digest in contents.files.items() if piece.files.get(path) != digest}
            send(files)
        return files, contents.tokens[piece.teacher].get(part.name), size

    @contextlib.contextmanager
    def _place(self, contents: Contents) -> Iterator[tuple[CacheWriter, Callable[[Mapping[str, FileDigest]], None]]]:
        """A writer, and what is to be done with the files that it wrote."""
        if self._job.cache_dir is not None:
            yield Joint(self._job.cache_dir, self._job.identity).writer_of(contents), lambda _: None
            return
        scratch = Path(tempfile.mkdtemp(prefix="kdcache-dump-"))
        try:
            yield CacheWriter(scratch, None, contents, Journal(scratch)), lambda files: self._send(scratch, files)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _send(self, scratch: Path, files: Mapping[str, FileDigest]) -> None:
        remote = self._remote
        assert remote is not None

        def send(path: str, stop: Stop) -> None:
            stop.check()
            key = file_key(files[path].sha256)
            there = remote.head(key)
            if there is None or there.size != files[path].size:
                send_file(remote, scratch / path, files[path])
            self._sent.add(key)

        by_digest = {digest.sha256: path for path, digest in files.items()}
        new = [path for sha, path in by_digest.items() if file_key(sha) not in self._sent]
        for_each(new, send, min(_SENDERS, max(1, len(new))))


def _check_versions(versions: Mapping[str, str]) -> None:
    own = driver_versions()
    for name, version in versions.items():
        if own.get(name) != version:
            raise MismatchError(
                f"it has {name} {own.get(name, 'not installed')}, the driver has {version}",
                "Install the same versions on every machine: the bytes of a cache depend on them.",
            )


def driver_versions() -> dict[str, str]:
    """The versions that must be equal on all machines of a dump."""
    return {**library_versions(), "python": ".".join(platform.python_version_tuple()[:2])}


def _reported(action: Callable[[], Outcome]) -> Outcome:
    """The result of ``action``, or its error as a value: exceptions of user code lose their hint on the way."""
    try:
        return action()
    except (NonFiniteError, SupersededError) as error:
        return Failed(type(error).__name__, error.message, error.hint, of_worker=False)
    except KdcacheError as error:
        return Failed(type(error).__name__, error.message, error.hint, for_good=isinstance(error, _FOR_GOOD))
    except Exception as error:  # such as out of memory: another worker may have more
        first = first_line(error)
        return Failed("KdcacheError", f"{type(error).__name__}: {first[:300]}", "")
