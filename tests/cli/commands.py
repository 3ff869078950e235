"""How the tests of the command line call it: in this process, through the real entry point."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from typing import Any

from kdcache.cli.main import main


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


def kdcache(*arguments: object) -> Said:
    """Run ``kdcache ARGUMENTS``; its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as left:
            assert isinstance(left.code, int)
            return Said(left.code, out.getvalue(), err.getvalue())
    raise AssertionError("the program always leaves with an exit code")
