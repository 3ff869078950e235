"""Shared by all measurements: interleaved rounds, medians with their spread, and facts about the machine.

Machines are noisy, so nothing is timed only once, and results of different runs are not compared. Contenders are
interleaved. A ratio is computed within each round, then its median is taken. The spread is the interquartile range.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "zarr", "pyarrow")


def rounds(contenders: Mapping[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Run ``count`` rounds; in each, every contender measures itself once, in rotating order."""
    names = list(contenders)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(count):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(contenders[name]())
    return found


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and interquartile range of all measured values."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": quartiles[1], "spread": quartiles[2] - quartiles[0], "n": len(values)}


def ratio(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """The ratio of two contenders, computed per round."""
    return summary([value / base for value, base in zip(values, reference, strict=True)])


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, MB."""
    try:  # getrusage would count the memory of the parent at the fork
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6
    except OSError:
        scale = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def forget_peak() -> None:
    """``peak_memory_mb`` counts from now on, where the system can forget."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def own_mb() -> float:
    """Resident memory of this process without mapped files, which processes share and the system may take back, MB."""
    memory = _process().memory_info()
    return float(memory.rss - getattr(memory, "shared", 0)) / 1e6


def resident_mb() -> float:
    """Resident memory of this process now, MB."""
    return float(_process().memory_info().rss) / 1e6


@functools.cache
def _process() -> Any:
    import psutil

    return psutil.Process()


def machine() -> dict[str, Any]:
    """Facts about the machine that a reader needs to interpret a figure."""
    import torch

    facts: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    facts |= {"load before": round(os.getloadavg()[0], 1), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {name: version(name) for name in PACKAGES}


def in_a_process(
    script: str, arguments: Sequence[str], *, python: str = sys.executable, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a benchmark script in its own process (peak memory is per process), and read its JSON output."""
    command = [python, str(Path(__file__).parent / script), *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **(environment or {})}
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # libraries may print before it
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
