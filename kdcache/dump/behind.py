"""One piece of work in a thread while the next one is prepared: what comes of a forward pass is stored while the next one runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class OneBehind(Generic[T]):
    """At most one action runs, in order. ``on_done`` gets what it gave back; what it raised is raised at the next one, or at the end."""

    def __init__(self, name: str, on_done: Callable[[T], None] = lambda _: None) -> None:
        self._on_done = on_done
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._pending: Future[T] | None = None

    def start(self, action: Callable[[], T]) -> None:
        """Start ``action`` once the one before is done."""
        self._settle()
        self._pending = self._executor.submit(action)

    def __enter__(self) -> OneBehind[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._settle()
        finally:
            self._executor.shutdown(wait=True)  # after an error of the caller, the action before still ends

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._on_done(pending.result())
