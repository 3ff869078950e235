"""Compares a distillation in N processes of one core each with one process on N cores: seconds of training.

    python benchmarks/processes.py quickstart/quickstart.toml --cache runs/quickstart/cache --set distill.epochs=1

The commands are those of a user: torchrun starts the N processes. Both train the same steps, and runs are interleaved.
One core each: OMP_NUM_THREADS is 1 in the one case and N in the other. Prints JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import machine, ratio, rounds, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    settings = [word for override in arguments.overrides for word in ("--set", override)]
    command = ["distill", arguments.recipe, "--cache", arguments.cache, *settings, "--json"]
    count = arguments.processes
    contenders = {
        f"1 process, {count} threads": functools.partial(train, command, 1, count),
        f"{count} processes, 1 thread each": functools.partial(train, command, count, 1),
    }
    seconds = rounds(contenders, arguments.rounds)
    one, several = seconds.values()
    report: dict[str, Any] = {"machine": machine(), "recipe": arguments.recipe, "overrides": arguments.overrides}
    report |= {f"training seconds, {name}": summary(found) for name, found in seconds.items()}
    report["rate of the processes / rate of the threads"] = ratio(one, several)
    json.dump(report, sys.stdout, indent=2)
    print()


def train(command: list[str], processes: int, threads: int) -> float:
    """Seconds of the training alone, from the results of the command."""
    start = [sys.executable, "-m", "kdcache"]
    if processes > 1:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        start = [sys.executable, "-m", *torchrun, "-m", "kdcache"]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        output = ["--output-dir", str(Path(folder))]
        done = subprocess.run([*start, *command, *output], env=environment, check=True, stdout=subprocess.PIPE)
    return float(json.loads(done.stdout)["training_seconds"])


if __name__ == "__main__":
    main()
