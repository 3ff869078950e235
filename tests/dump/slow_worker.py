"""A worker of the tests: it marks the beginning of a piece and takes its time, so that it can be killed there."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from kdcache.dump.engines.messages import Piece, Written
from kdcache.dump.engines.worker import Worker

MARKS = "KDCACHE_TEST_MARKS"


class SlowWorker(Worker):
    """Writes ``<pid>-<teacher>-<part>`` into the directory of marks, sleeps, then works."""

    def _run(self, piece: Piece, bases: Mapping[int, bytes]) -> Written:
        Path(os.environ[MARKS], f"{os.getpid()}-{piece.teacher}-{piece.task.part.name}").touch()
        time.sleep(0.4)
        return super()._run(piece, bases)
