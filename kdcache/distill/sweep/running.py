"""Work on many students, in this process or in several; a student that fails does not stop the others.

Processes are started once and get one student after the other, because starting one (imports of torch and
transformers) takes longer than a tiny student. They end with the process that started them, however that one ends, so
that nobody trains in a directory that a later command works on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from kdcache.cores import usable_cores

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why a student has no results: the error line that its command would have printed, hint and exit code."""

    message: str
    hint: str = ""
    exit_code: int = 1


@dataclass(frozen=True)
class Worker(Generic[T]):
    """What a process does with a student, and how it puts an exception into words. Both are module-level functions."""

    work: Callable[[T], None]
    explain: Callable[[BaseException], tuple[str, str, int]]

    def attempt(self, student: T) -> Failure | None:
        """Do the work; a failure is returned. An interruption by the user passes through."""
        try:
            self.work(student)
        except Exception as error:
            return Failure(*self.explain(error))
        return None


def run_all(
    students: Sequence[T],
    worker: Worker[T],
    *,
    jobs: int = 1,
    threads: int | None = None,
    done: Callable[[T, Failure | None], None],
) -> None:
    """Work on all students; ``done`` is called in this process after each one.

    Args:
        students: in the order in which they start.
        worker: what to do with each.
        jobs: number of processes; 1 works in this one.
        threads: of each process; by default the cores (or OMP_NUM_THREADS) divided by ``jobs``.
        done: gets the student and None, or why it failed.
    """
    jobs = min(jobs, len(students))
    if jobs > 1:
        _Processes(worker, jobs, threads or threads_each(jobs)).run(students, done)
        return
    if threads is not None:
        _use_threads(threads)
    for student in students:
        done(student, worker.attempt(student))


def threads_each(jobs: int) -> int:
    """The threads of each of ``jobs`` processes that share this machine's cores, or those of OMP_NUM_THREADS."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    cores = int(given) if given.isdecimal() and int(given) else usable_cores()
    return max(1, cores // jobs)


@dataclass
class _Process(Generic[T]):
    process: Any
    connection: Connection
    student: T


class _Processes(Generic[T]):
    """A process per job; one that dies is replaced, and its student counts as failed."""

    def __init__(self, worker: Worker[T], jobs: int, threads: int) -> None:
        self._worker, self._jobs, self._threads = worker, jobs, threads
        self._context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang

    def run(self, students: Sequence[T], done: Callable[[T, Failure | None], None]) -> None:
        waiting = list(reversed(students))
        busy = [self._start(waiting.pop()) for _ in range(self._jobs)]
        try:
            while busy:
                ready = wait([each.connection for each in busy])
                for each in [each for each in busy if each.connection in ready]:
                    busy.remove(each)
                    failure, alive = _result(each)
                    done(each.student, failure)
                    if waiting and alive:
                        busy.append(self._give(each, waiting.pop()))
                    elif waiting:
                        busy.append(self._start(waiting.pop()))
                    else:
                        _end(each)
        finally:
            for each in busy:
                each.process.kill()
                _end(each)

    def _start(self, student: T) -> _Process[T]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._worker, self._threads))
        process.start()
        theirs.close()
        ours.send(student)
        return _Process(process, ours, student)

    def _give(self, to: _Process[T], student: T) -> _Process[T]:
        to.connection.send(student)
        return _Process(to.process, to.connection, student)


def _result(of: _Process[T]) -> tuple[Failure | None, bool]:
    """The result of a student, and whether its process is still there."""
    try:
        return of.connection.recv(), True
    except (EOFError, ConnectionError):
        _end(of)
        code = of.process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "If the machine ran out of memory, use a smaller --jobs or distill.batch_size."
        return Failure(f"the process of this student ended with {how}", hint), False


def _end(process: _Process[T]) -> None:
    process.connection.close()
    process.process.join()


def _serve(connection: Connection, worker: Worker[T], threads: int) -> None:
    """The main function of a process: students until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _use_threads(threads)
    while True:
        try:
            student = connection.recv()
        except (EOFError, ConnectionError):
            return
        connection.send(worker.attempt(student))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _use_threads(threads: int) -> None:
    os.environ |= {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}  # torch reads it when imported
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)
