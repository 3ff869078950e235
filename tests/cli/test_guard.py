"""Every exception becomes one line, one hint and the right exit code."""

from __future__ import annotations

import errno
import sys

import pytest
import typer

from kdcache.cli.guard import explain, guarded
from kdcache.errors import (
    DamageError,
    DataError,
    KdcacheError,
    LockedError,
    LostProcessError,
    MismatchError,
    ModelError,
    NonFiniteError,
    RecipeError,
    StorageError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("m", "h"), 2),
        (DataError("m", "h"), 2),
        (ModelError("m", "h"), 1),
        (NonFiniteError("m", "h"), 1),
        (StorageError("m", "h"), 1),
        (LockedError("m", "h"), 1),
        (LostProcessError("m", "h"), 1),
        (DamageError("m", "h"), 3),
        (MismatchError("m", "h"), 4),
    ],
)
def test_our_own_errors_say_message_hint_and_code(
    error: KdcacheError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as left:
        guarded(command)()
    assert left.value.exit_code == code
    assert capsys.readouterr().err == "error: m\nhint: h\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_plainly(number: int) -> None:
    message, hint, code = explain(OSError(number, "No space left on device", "runs/x/cache"))
    assert (message, code) == ("the disk is full while writing 'runs/x/cache'", 1)
    assert "same command again" in hint


def test_an_interruption_says_how_to_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/kdcache", "run", "my task.toml"])
    assert explain(KeyboardInterrupt()) == (
        "interrupted",
        "Continue with the same command: kdcache run 'my task.toml'",
        130,
    )


def test_out_of_memory_names_the_keys_that_help() -> None:
    message, hint, code = explain(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"))
    assert (message, code) == ("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB", 1)
    assert "batch_size" in hint


def test_anything_else_is_unexpected_and_says_how_to_see_more() -> None:
    assert explain(ZeroDivisionError("division by zero\nsecond line")) == (
        "unexpected: ZeroDivisionError: division by zero",
        "See where it happened with KDCACHE_DEBUG=1.",
        1,
    )


@pytest.mark.parametrize(("debug", "shown"), [("1", True), ("0", False)])
def test_the_traceback_is_for_those_who_ask(
    debug: str, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise KeyError("x")

    monkeypatch.setenv("KDCACHE_DEBUG", debug)
    with pytest.raises(typer.Exit):
        guarded(command)()
    assert ("Traceback" in capsys.readouterr().err) is shown


@pytest.mark.parametrize("error", [typer.Exit(3), typer.BadParameter("no")])
def test_what_typer_raises_passes(error: Exception) -> None:
    def command() -> None:
        raise error

    with pytest.raises(type(error)):
        guarded(command)()
