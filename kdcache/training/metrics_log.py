"""metrics.jsonl: one JSON object per logged step and per epoch; an interruption does not damage it.

Every line names its stage. When a stage starts or resumes, its lines after the step of the checkpoint are removed, so
that no step occurs twice. Lines of other stages, which share the file, stay.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcache import files
from kdcache.files import make_directory, replace_file


class MetricsLog:
    """Callable for ``loop.train(on_metrics=...)``.

    Two events are not written: ``start`` removes later lines, and ``checkpoint`` makes the lines so far durable. Lines
    of steps are not durable one by one, since an fsync takes as long as a step on a GPU; other lines are.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self._path = path
        self._stage = stage

    def __call__(self, line: Mapping[str, Any]) -> None:
        if line.get("event") == "start":
            self._drop_after(int(line["step"]))
            return
        make_directory(self._path.parent)
        new = not self._path.exists()
        with self._path.open("a", encoding="utf-8") as file:
            if line.get("event") != "checkpoint":
                file.write(json.dumps({"stage": self._stage, **_finite(line)}, allow_nan=False) + "\n")
            if line.get("event") != "steps":
                file.flush()
                os.fsync(file.fileno())
        if new:
            files.disk.fsync_directory(self._path.parent)

    @property
    def stage(self) -> str:
        """The name of the stage, as in its lines."""
        return self._stage

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def directory(self) -> Path:
        """Where the file is."""
        return self._path.parent

    def epochs(self) -> list[dict[str, Any]]:
        """The lines of this stage that end an epoch, in order; empty without a file."""
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        entries = [json.loads(line) for line in text.splitlines()]
        return [entry for entry in entries if entry["stage"] == self._stage and entry["event"] == "epoch"]

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8")
        kept = "".join(f"{line}\n" for line in text.splitlines() if self._stays(line, step))
        if kept != text:
            replace_file(self._path, kept.encode())

    def _stays(self, line: str, step: int) -> bool:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # a partial line of a killed process
            return False
        return bool(entry.get("stage") != self._stage or int(entry.get("step", 0)) <= step)


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and infinity become null, which JSON can express: e.g. the gradient norm of a skipped fp16 step."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
