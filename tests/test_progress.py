"""Progress: plain lines where stderr is no terminal, a live line where it is, stdout left alone."""

from __future__ import annotations

import io

import pytest

from kdcache.progress import Progress, RichProgress, SilentProgress, format_bytes, format_rate, format_seconds


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_every_ten_seconds_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = RichProgress(stream, clock=clock)
    progress.start("dump bert", 4000, "rows")
    for second in range(1, 26):
        clock.now = float(second)
        progress.advance(100, bytes_done=50_000, loss=0.25)
    progress.finish()
    assert stream.getvalue().splitlines() == [
        "dump bert: 1,000/4,000 rows (25%) · 100 rows/s · 500 kB (50 kB/s) · loss 0.25 · 0:30 left",
        "dump bert: 2,000/4,000 rows (50%) · 100 rows/s · 1 MB (50 kB/s) · loss 0.25 · 0:20 left",
        "dump bert: 2,500/4,000 rows (62%) · 100 rows/s · 1.25 MB (50 kB/s) · loss 0.25 · took 0:25",
    ]


def test_units_of_an_earlier_run_do_not_count_for_the_rate() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = RichProgress(stream, clock=clock)
    progress.start("train", 400, "steps", done=200)
    clock.now = 10.0
    progress.advance(5)
    assert stream.getvalue() == "train: 205/400 steps (51%) · 0.5 steps/s · 6:30 left\n"


def test_a_new_task_ends_the_one_before() -> None:
    stream = io.StringIO()
    progress = RichProgress(stream, clock=Clock())
    progress.start("first", 1, "rows")
    progress.start("second", 0, "steps")
    progress.finish()
    progress.finish()
    assert stream.getvalue() == "first: 0/1 rows (0%) · took 0:00\nsecond: 0/0 steps · took 0:00\n"


def test_notes_are_lines_of_their_own_with_or_without_a_task() -> None:
    stream = io.StringIO()
    progress = RichProgress(stream, clock=Clock())
    progress.note("[data] 9 rows repeat a text")
    progress.start("train", 2, "steps")
    progress.note("epoch 1")
    assert stream.getvalue() == "[data] 9 rows repeat a text\nepoch 1\n"


def test_a_terminal_gets_a_live_line_and_the_same_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    stream, clock = Terminal(), Clock()
    progress = RichProgress(stream, clock=clock)
    progress.start("train [1]", 10, "steps")
    clock.now = 2.0
    progress.advance(4, loss=0.5)
    progress.note("a [note]")
    print("a result")  # while the line is live, stdout still goes to stdout
    progress.finish()
    written = stream.getvalue()
    assert "a [note]" in written
    assert written.endswith("train [1]: 4/10 steps (40%) · 2 steps/s · loss 0.5 · took 0:02\n")
    assert capsys.readouterr().out == "a result\n"


def test_advance_without_a_task_is_harmless() -> None:
    stream = io.StringIO()
    RichProgress(stream).advance(3)
    assert stream.getvalue() == ""


def test_silent_progress_takes_the_same_calls() -> None:
    progress: Progress = SilentProgress()
    progress.start("x", 1, "rows")
    progress.advance(1, bytes_done=3, loss=0.1)
    progress.note("nothing")
    progress.finish()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (3_140_000, "3.14 MB"),
        (999_600, "1 MB"),
        (158.9e9, "159 GB"),
        (2e15, "2,000 TB"),
    ],
)
def test_bytes_have_three_digits(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_times_and_rates() -> None:
    assert [format_seconds(seconds) for seconds in (0, 42.4, 60, 3803, 90061)] == [
        "0:00",
        "0:42",
        "1:00",
        "1:03:23",
        "25:01:01",
    ]
    assert [format_rate(rate) for rate in (0.0423, 12.34, 210.7, 12345)] == ["0.0423", "12.3", "211", "12,345"]
