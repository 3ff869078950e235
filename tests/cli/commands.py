"""How the tests of the command line call it: in this process, with exit code, stdout and stderr."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kdcache.cli.main import main


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str


def kdcache(capsys: pytest.CaptureFixture[str], *arguments: object) -> Said:
    """Run ``kdcache ARGUMENTS`` through the real entry point."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    code = left.value.code
    assert isinstance(code, int)
    return Said(code, captured.out, captured.err)
