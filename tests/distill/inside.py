"""Python programs that a test starts, run in the test's own process: starting one costs seconds of imports."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

start_process = subprocess.run


def programs_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on ``subprocess.run([sys.executable, ...])`` runs the program in this process.

    The program gets the same arguments and environment. Everything that it starts in turn runs here too. Programs that
    are not Python start as before.
    """
    monkeypatch.setattr(subprocess, "run", _run)


def _run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    if command[0] != sys.executable:
        return start_process(command, **options)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _started(command[1:], options.get("env")):
        code = _exit_code(_program(command[1:]))
    sys.stderr.write(err.getvalue())
    if options.get("check") and code:
        raise subprocess.CalledProcessError(code, command, out.getvalue(), err.getvalue())
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def _program(words: list[str]) -> Callable[[], object]:
    """The program of ``python WORDS``: ``-c CODE``, ``-m MODULE`` or a script."""
    if words[0] == "-c":
        return lambda: exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    if words[0] == "-m":
        return lambda: runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    return lambda: runpy.run_path(words[0], run_name="__main__")


def _exit_code(program: Callable[[], object]) -> int:
    try:
        program()
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def _started(words: list[str], environment: Mapping[str, str] | None) -> Iterator[None]:
    """Arguments, environment and import path as the program finds them; those of the test afterwards."""
    before = dict(os.environ), sys.argv, sys.path
    sys.argv = words[1:] if words[0] == "-m" else [words[0], *words[2:]] if words[0] == "-c" else words
    sys.path = [str(Path(words[0]).resolve().parent), *sys.path]
    try:
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before[0])
        sys.argv, sys.path = before[1:]
