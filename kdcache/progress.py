"""Progress of long work on stderr: how far, how fast, how many bytes, how long still, and the last loss.

On a terminal it is one live line by rich; elsewhere (a log file, a CI job) one plain line about every ten seconds and
one at the end, so that logs stay readable. stdout is never touched: it belongs to results. Stages take a ``Progress``
and know neither; tests and library users pass ``SilentProgress``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

PLAIN_SECONDS = 10.0  # between two lines where stderr is no terminal
_LONGEST_NAME = 80  # characters of a name in a message
_WHOLE = 10  # names that two lists are compared by in full
_UNITS = ("B", "kB", "MB", "GB", "TB")


class Progress(Protocol):
    """What a stage reports to; one task at a time."""

    def start(self, title: str, total: int, unit: str) -> None:
        """Begin a task of ``total`` units, e.g. ``start("dump bert", 6920, "rows")``; ends the one before."""

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:
        """``count`` more units and ``bytes_done`` more bytes are done.

        ``values`` (``loss=0.31``) are shown as they are.
        """

    def note(self, message: str) -> None:
        """A line for the human."""

    def finish(self) -> None:
        """End the task; harmless where none runs."""


class SilentProgress:
    """Says nothing."""

    def start(self, title: str, total: int, unit: str) -> None: ...

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None: ...

    def note(self, message: str) -> None: ...

    def finish(self) -> None: ...


@dataclass
class _Task:
    """What has been counted of the running task; times in seconds of the clock that was passed."""

    title: str
    total: int
    unit: str
    began: float
    done: int = 0
    bytes_done: int = 0
    values: dict[str, float] = field(default_factory=dict)

    def measures(self, now: float, *, ended: bool = False) -> str:
        """``210 rows/s · 3.1 MB/s · loss 0.3102 · 0:42 left``."""
        elapsed = now - self.began
        parts = []
        if self.done and elapsed > 0 and self.unit != "bytes":
            parts.append(f"{format_rate(self.done / elapsed)} {self.unit}/s")
        if self.bytes_done and elapsed > 0:
            parts.append(f"{format_bytes(self.bytes_done)} ({format_bytes(self.bytes_done / elapsed)}/s)")
        parts += [f"{name} {value:.4g}" for name, value in self.values.items()]
        if ended:
            parts.append(f"took {format_seconds(elapsed)}")
        elif self.done and self.total > self.done:
            parts.append(f"{format_seconds(elapsed / self.done * (self.total - self.done))} left")
        return " · ".join(parts)

    def line(self, now: float, *, ended: bool = False) -> str:
        share = f" ({100 * self.done // self.total}%)" if self.total else ""
        measures = self.measures(now, ended=ended)
        return f"{self.title}: {self.done:,}/{self.total:,} {self.unit}{share}" + (f" · {measures}" if measures else "")


class RichProgress:
    """A live line on a terminal, plain lines elsewhere; both on stderr. Rates count from the start of the task."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._task: _Task | None = None
        self._live: Any = None  # rich.progress.Progress while a task runs on a terminal
        self._row: Any = None
        self._last_line = 0.0

    def start(self, title: str, total: int, unit: str) -> None:
        self.finish()
        now = self._clock()
        self._task = _Task(title, total, unit, began=now)
        self._last_line = now
        if self._stream.isatty():
            self._live = _live_line(self._stream)
            self._live.start()
            self._row = self._live.add_task(title, total=total, unit=unit, measures="")

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
            self._live.stop()  # the line is transient: the plain one below stays instead
            self._live = None
        if task is not None:
            self._print(task.line(self._clock(), ended=True))

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


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
    """Names for a message: the first ``most``, long ones cut, the rest counted; ``none`` where there are none.

    A task may have thousands of labels and a file thousands of columns: a message that repeats them all says nothing.
    """
    every = [str(name) for name in names]
    cut = [name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name in every[:most]]
    shown = ", ".join(f"'{name}'" for name in cut) if quoted else ", ".join(cut)
    return (shown or "none") + (f" and {len(every) - most:,} more" if len(every) > most else "")


def listed_apart(one: Sequence[str], other: Sequence[str]) -> tuple[str, str]:
    """Two lists of names that should be the same, for a message.

    Whole where they are short, else what each has and the other lacks.
    """
    if max(len(one), len(other)) <= _WHOLE:
        return listed(one), listed(other)
    of_one, of_other = set(one), set(other)
    apart = [name for name in one if name not in of_other], [name for name in other if name not in of_one]
    if any(apart):
        first, second = (
            f"{len(every):,}" + (f", with {listed(own, most=5)}" if own else "")
            for every, own in zip((one, other), apart, strict=True)
        )
        return first, second
    place = next((number for number, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
    first, second = (f"(number {place} is '{listed(names[place : place + 1])}')" for names in (one, other))
    return f"{len(one):,} in another order {first}", f"{len(other):,} {second}"


def format_bytes(count: float) -> str:
    """Decimal units, three digits: ``3.14 MB``."""
    for unit in _UNITS[:-1]:
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{format_rate(count)} {_UNITS[-1]}"


def format_share(share: float) -> str:
    """``12.3%``; what is not zero is not shown as zero."""
    return f"{100 * share:.1f}%" if share >= 0.0005 or not share else "under 0.1%"


def format_seconds(seconds: float) -> str:
    """``0:42`` or ``1:03:20``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def format_rate(rate: float) -> str:
    """Whole numbers from 100 on, three digits below."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
