"""Turns exceptions into an error line, a hint and an exit code."""

from __future__ import annotations

import errno
import functools
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from kdcache.cli.output import out
from kdcache.errors import KdcacheError, LostProcessError, first_line
from kdcache.training import processes

INTERRUPTED = 130
EXIT_CODES = {
    0: "done",
    1: "failed: disk full, out of memory, non-finite values, a model that cannot do what the recipe asks",
    2: "usage or recipe error: unknown key, missing column, missing file",
    3: "a check found damage or a difference",
    4: "refused: what exists does not match what is requested",
    INTERRUPTED: "interrupted; the same command continues",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``command``: report its exceptions, and give typer only an exit code.

    Of several processes of a training, one reports, and all have its exit code.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError:  # the reader closed the pipe (kdcache ... | head)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (Exception, KeyboardInterrupt) as error:
            message, hint, code = explain(error)
            if os.environ.get("KDCACHE_DEBUG") == "1":
                traceback.print_exc()
            lost = isinstance(error, LostProcessError)
            speaks, code = processes.ending(code, lost=lost)
            if speaks:
                out.error(message, hint)
            processes.close(spoke=speaks, lost=lost)
            raise typer.Exit(code) from None

    return run


def explain(error: BaseException) -> tuple[str, str, int]:
    """(message, hint, exit code) of any exception."""
    if isinstance(error, KdcacheError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        if processes.current().world > 1:
            return "interrupted", "Continue with the same command, in as many processes as you like.", INTERRUPTED
        return "interrupted", f"Continue with the same command: {shlex.join(['kdcache', *sys.argv[1:]])}", INTERRUPTED
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f" while writing '{error.filename}'" if error.filename else ""
        return f"the disk is full{where}", "Free some space and run the same command again: what is written is kept.", 1
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return (
            f"out of memory: {first_line(error)}",
            "Lower batch_size or dump.tokens_per_batch, or raise accumulation.",
            1,
        )
    return f"unexpected: {type(error).__name__}: {first_line(error)}", "See where it happened with KDCACHE_DEBUG=1.", 1
