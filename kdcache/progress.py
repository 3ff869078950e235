"""Progress of long work on stderr: position, rate, bytes, time left, and the last loss; and formats for messages.

On a terminal rich shows one live line; under the cell of a notebook a text changes in place. Elsewhere (a log file, a
CI job) a plain line is printed about every ten seconds and at the end. stdout is reserved for results. Stages take a
``Progress``; tests and library users pass ``SilentProgress``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

PLAIN_SECONDS = 10.0  # between two plain lines
NOTEBOOK_SECONDS = 0.2  # between two changes of a notebook's text
_LONGEST_NAME = 80  # characters of a name in a message
_WHOLE = 10  # names up to which two lists are shown in full
_UNITS = ("B", "kB", "MB", "GB", "TB")


class Progress(Protocol):
    """Receives the progress of a stage; one task at a time."""

    def start(self, title: str, total: int, unit: str, *, done: int = 0) -> None:
        """Begin a task of ``total`` units, e.g. ``start("dump bert", 6920, "rows")``; ends the previous one.

        ``done``: units that an earlier run did; they count for the position, not for the rate.
        """

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:
        """Add ``count`` units and ``bytes_done`` bytes; ``values`` (``loss=0.31``) are shown as they are."""

    def note(self, message: str) -> None:
        """Print a line."""

    def finish(self) -> None:
        """End the task, if there is one."""


class SilentProgress:
    """Prints nothing."""

    def start(self, title: str, total: int, unit: str, *, done: int = 0) -> None: ...

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None: ...

    def note(self, message: str) -> None: ...

    def finish(self) -> None: ...


@dataclass
class _Task:
    """Counters of the current task; times in seconds."""

    title: str
    total: int
    unit: str
    began: float
    earlier: int = 0  # units that an earlier run did, part of ``done``
    done: int = 0
    bytes_done: int = 0
    values: dict[str, float] = field(default_factory=dict)

    def measures(self, now: float, *, ended: bool = False) -> str:
        """``210 rows/s · 3.1 MB/s · loss 0.3102 · 0:42 left``."""
        elapsed = now - self.began
        new = self.done - self.earlier
        parts = []
        if new and elapsed > 0 and self.unit != "bytes":
            parts.append(f"{format_rate(new / elapsed)} {self.unit}/s")
        if self.bytes_done and elapsed > 0:
            parts.append(f"{format_bytes(self.bytes_done)} ({format_bytes(self.bytes_done / elapsed)}/s)")
        parts += [f"{name} {value:.4g}" for name, value in self.values.items()]
        if ended:
            parts.append(f"took {format_seconds(elapsed)}")
        elif new and self.total > self.done:
            parts.append(f"{format_seconds(elapsed / new * (self.total - self.done))} left")
        return " · ".join(parts)

    def line(self, now: float, *, ended: bool = False) -> str:
        share = f" ({100 * self.done // self.total}%)" if self.total else ""
        measures = self.measures(now, ended=ended)
        return f"{self.title}: {self.done:,}/{self.total:,} {self.unit}{share}" + (f" · {measures}" if measures else "")


class RichProgress:
    """A live line on a terminal, plain lines elsewhere; on stderr. Rates are means of this run of the task."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._task: _Task | None = None
        self._live: Any = None  # rich.progress.Progress while a task runs on a terminal
        self._row: Any = None
        self._last_line = 0.0

    def start(self, title: str, total: int, unit: str, *, done: int = 0) -> None:
        self.finish()
        now = self._clock()
        self._task = _Task(title, total, unit, began=now, earlier=done, done=done)
        self._last_line = now
        if self._stream.isatty():
            self._live = _live_line(self._stream)
            self._live.start()
            self._row = self._live.add_task(title, total=total, completed=done, unit=unit, measures="")

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:
        task = self._task
        if task is None:
            return
        task.done += count
        task.bytes_done += bytes_done
        task.values.update(values)
        now = self._clock()
        if self._live is not None:
            self._live.update(self._row, completed=task.done, measures=task.measures(now))
        elif now - self._last_line >= PLAIN_SECONDS:
            self._print(task.line(now))
            self._last_line = now

    def note(self, message: str) -> None:
        if self._live is not None:
            self._live.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(message)

    def finish(self) -> None:
        task, self._task = self._task, None
        if self._live is not None:
            self._live.stop()  # the live line is transient; the plain line below stays
            self._live = None
        if task is not None:
            self._print(task.line(self._clock(), ended=True))

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class NotebookProgress:
    """One text under a notebook's cell, which changes in place: finished tasks, notes, and the task that runs.

    ``display``: that of IPython, which returns a handle with ``update``.
    """

    def __init__(self, display: Callable[..., Any], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._display, self._clock = display, clock
        self._handle: Any = None
        self._lines: list[str] = []
        self._task: _Task | None = None
        self._shown = 0.0

    def start(self, title: str, total: int, unit: str, *, done: int = 0) -> None:
        self.finish()
        self._task = _Task(title, total, unit, began=self._clock(), earlier=done, done=done)
        self._show()

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:
        if self._task is None:
            return
        self._task.done += count
        self._task.bytes_done += bytes_done
        self._task.values.update(values)
        if self._clock() - self._shown >= NOTEBOOK_SECONDS:
            self._show()

    def note(self, message: str) -> None:
        self._lines.append(message)
        self._show()

    def finish(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            self._lines.append(task.line(self._clock(), ended=True))
            self._show()

    def _show(self) -> None:
        self._shown = self._clock()
        running = [] if self._task is None else [self._task.line(self._shown)]
        text = {"text/plain": "\n".join([*self._lines, *running])}
        if self._handle is None:
            self._handle = self._display(text, raw=True, display_id=True)
        else:
            self._handle.update(text, raw=True)


def default_progress() -> Progress:
    """For functions that are called from Python: in a notebook a text under the cell, else lines on stderr."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is None:  # IPython in a terminal has none
        return RichProgress()
    from IPython.display import display

    return NotebookProgress(display)


def _live_line(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}", markup=False),
        TextColumn("{task.fields[measures]}", markup=False),
    )
    return Progress(*columns, console=Console(file=stream), transient=True, redirect_stdout=False)


def counted(count: int, noun: str) -> str:
    """``1 file``, ``2,048 files``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Iterable[object], *, most: int = 20, quoted: bool = False) -> str:
    """Names for a message: the first ``most``, shortened, and a count of the others; ``none`` if there are none."""
    every = [str(name) for name in names]
    cut = [name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name in every[:most]]
    shown = ", ".join(f"'{name}'" for name in cut) if quoted else ", ".join(cut)
    return (shown or "none") + (f" and {len(every) - most:,} more" if len(every) > most else "")


def listed_apart(first: Sequence[str], second: Sequence[str]) -> tuple[str, str]:
    """Two lists of names that should be equal, for a message: in full if short, else what only one of them has."""
    if max(len(first), len(second)) <= _WHOLE:
        return listed(first), listed(second)
    in_first, in_second = set(first), set(second)
    apart = [name for name in first if name not in in_second], [name for name in second if name not in in_first]
    if any(apart):
        left, right = (
            f"{len(names):,}" + (f", with {listed(own, most=5)}" if own else "")
            for names, own in zip((first, second), apart, strict=True)
        )
        return left, right
    place = next((number for number, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), 0)
    left, right = (f"(number {place} is '{listed(names[place : place + 1])}')" for names in (first, second))
    return f"{len(first):,} in another order {left}", f"{len(second):,} {right}"


def format_bytes(count: float) -> str:
    """Decimal units, three digits: ``3.14 MB``."""
    for unit in _UNITS[:-1]:
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{format_rate(count)} {_UNITS[-1]}"


def format_share(share: float) -> str:
    """``12.3%``; a small share is not shown as zero."""
    return f"{100 * share:.1f}%" if share >= 0.0005 or not share else "under 0.1%"


def format_seconds(seconds: float) -> str:
    """``0:42`` or ``1:03:20``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def format_rate(rate: float) -> str:
    """Whole numbers from 100 on, three digits below."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
