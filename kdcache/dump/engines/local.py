"""One worker in this process: how a single machine dumps to a remote more than its own disk holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from kdcache.dump.engines.dispatch import DEPTH, Event, Key
from kdcache.dump.engines.worker import Worker

if TYPE_CHECKING:
    from kdcache.dump.engines.cluster import Message
    from kdcache.dump.engines.messages import Job, Outcome

_NAME = "here"


class LocalEngine:
    """Runs the pieces in threads of this process."""

    @contextlib.contextmanager
    def pool(self, job: Job, message: Message) -> Iterator[_LocalPool]:
        worker = Worker(job)
        executor = ThreadPoolExecutor(DEPTH, thread_name_prefix="kdcache-worker")
        try:
            yield _LocalPool(worker, message, executor)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
            worker.close()


class _LocalPool:
    def __init__(self, worker: Worker, message: Message, executor: ThreadPoolExecutor) -> None:
        self._worker, self._message, self._executor = worker, message, executor
        self._pending: dict[Future[Outcome], Key | None] = {executor.submit(worker.check): None}

    def submit(self, worker: str, key: Key) -> None:  # noqa: ARG002 - there is one
        self._pending[self._executor.submit(self._worker.do, *self._message(key))] = key

    def wait(self, seconds: float) -> Sequence[Event]:
        ended = wait(self._pending, seconds, FIRST_COMPLETED).done
        return [Event(_NAME, self._pending.pop(future), future.result()) for future in ended]

    def drop(self, worker: str) -> None:
        pass

    def may_grow(self) -> bool:
        return None in self._pending.values()
