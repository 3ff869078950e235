"""Compares a dump by two Ray workers of one core each with a local dump that has two cores; and measures the driver.

    python benchmarks/cluster.py quickstart/quickstart.toml --teachers runs/quickstart/teachers --texts 2048
    python benchmarks/cluster.py --simulate 100000

Both dumps run the recipe's first teacher over the same texts, each in a process of its own, into a new cache. A rate is
texts per second between the first and the last result, so that starting processes and loading teachers, which a long
dump does once, do not count; ``whole`` is the time of the command with them. ``--simulate`` runs the driver alone:
made-up workers answer at once, messages are pickled as Ray would do it, and records are taken into the contents.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import in_a_process, machine, ratio, rounds, summary

from kdcache.dump.engines.dispatch import Crew, Drive, Event, Key, Work
from kdcache.dump.engines.messages import About, Fitted, Outcome, Piece, Written
from kdcache.files import FileDigest

CORES = 2
FILES = 9  # of a part: outputs, tokens, and three layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--teachers", type=Path)
    parser.add_argument("--texts", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--simulate", type=int, default=0, metavar="PARTS")
    parser.add_argument("--workers", type=int, default=64, help="of the simulation")
    parser.add_argument("--quick", action="store_true", help="as little as possible; the figures mean nothing")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--one", choices=("local", "ray"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.texts, arguments.rounds, arguments.simulate = 16, 1, 200
    if arguments.one:
        print(json.dumps(dump(arguments)))
        return
    report: dict[str, Any] = {"machine": machine()}
    if arguments.simulate:
        report["driver"] = simulate(arguments.simulate, arguments.workers)
    if arguments.recipe:
        report |= {"recipe": arguments.recipe, "texts": arguments.texts, **compare(arguments)}
    json.dump(report, sys.stdout, indent=2)
    print()


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates of the two dumps, interleaved."""
    found: dict[str, list[dict[str, float]]] = {"local": [], "ray": []}

    def contender(name: str) -> float:
        own = [arguments.recipe, "--teachers", str(arguments.teachers), "--texts", str(arguments.texts), "--one", name]
        for override in arguments.overrides:
            own += ["--set", override]
        threads = str(CORES) if name == "local" else "1"
        found[name].append(in_a_process("cluster.py", own, environment={"OMP_NUM_THREADS": threads}))
        return found[name][-1]["texts per second"]

    names = {"local": lambda: contender("local"), "ray": lambda: contender("ray")}
    rates = rounds(names, arguments.rounds)
    report: dict[str, Any] = {
        name: {"texts per second": summary(values), "whole, seconds": summary([one["whole"] for one in found[name]])}
        for name, values in rates.items()
    }
    return {**report, "ray / local": ratio(rates["ray"], rates["local"])}


def dump(arguments: argparse.Namespace) -> dict[str, float]:
    """One dump of the recipe's first teacher, in this process."""
    from kdcache.dump.engines.cluster import dump_on_shared_disk
    from kdcache.dump.engines.ray_actors import RayEngine
    from kdcache.dump.engines.shards import Shard, dump_shard
    from kdcache.dump.stage import prepare_dump
    from kdcache.recipe import load_recipe

    size = max(1, arguments.texts // 16)
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, f"dump.part_size={size}", "data.transfer=[]"])
    recipe = recipe.model_copy(update={"teachers": recipe.teachers[:1]})
    rate = _Rate()
    with tempfile.TemporaryDirectory(prefix="kdcache-cluster-") as folder:
        job = prepare_dump(recipe, arguments.teachers, Path(folder) / "cache", progress=rate)
        train = job.task.splits["train"]
        few = replace(
            train, text_ids=train.text_ids[: arguments.texts], labels=train.labels[: arguments.texts], groups=None
        )
        job = replace(job, task=replace(job.task, splits={"train": few}))
        began = time.perf_counter()
        if arguments.one == "local":
            dump_shard(job, Shard(0, 1))
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of this machine, for this measurement
            dump_on_shared_disk(job, RayEngine(workers=CORES, gpus=0.0))
        whole = time.perf_counter() - began
    return {"texts per second": rate.value(), "whole": whole}


class _Rate:
    """A ``Progress`` that remembers when how many texts of the dump were done."""

    def __init__(self) -> None:
        self._dumping = False
        self._done: list[tuple[float, int]] = []

    def start(self, title: str, total: int, unit: str, *, done: int = 0) -> None:  # noqa: ARG002
        self._dumping = title.startswith("dump")

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:  # noqa: ARG002
        if self._dumping and count:
            self._done.append((time.perf_counter(), count))

    def note(self, message: str) -> None: ...

    def finish(self) -> None: ...

    def value(self) -> float:
        """Texts per second after the first eighth: each worker has its teacher then."""
        first = len(self._done) // 8
        texts = sum(count for _, count in self._done[first + 1 :])
        return texts / (self._done[-1][0] - self._done[first][0]) if texts else 0.0


def simulate(parts: int, workers: int) -> dict[str, Any]:
    """Time of the driver per part, with workers that answer at once. Three teachers."""
    names = [f"part-{number:05d}" for number in range(parts // 3 + 1)]
    work = Work({f"teacher-{number}": [(name, True) for name in names] for number in range(3)}, ["teacher-0"])
    total = work.left
    pool = _Pool(workers)
    files: dict[str, FileDigest] = {}

    def take(outcome: Written | Fitted, _: Crew) -> None:
        if isinstance(outcome, Written):
            files.update(outcome.files)

    began, cpu = time.perf_counter(), time.process_time()
    Drive(pool, work, take, lambda _: None).run()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "parts": total,
        "workers": workers,
        "seconds": seconds,
        "microseconds per part": 1e6 * seconds / total,
        "processor, microseconds per part": 1e6 * cpu / total,
        "bytes of a message": pool.bytes,
        "parts per second that the driver can give out": total / seconds,
    }


class _Pool:
    """Workers that answer at the next call."""

    def __init__(self, workers: int) -> None:
        self._joining = [f"worker-{number}" for number in range(workers)]
        self._queue: deque[Event] = deque()
        self._texts = [(f"text {number:04d} of some forty characters, made up",) for number in range(1024)]
        self._ids = np.zeros((1024, 16), np.uint8)
        self.bytes = 0

    def submit(self, worker: str, key: Key) -> None:
        from kdcache.cache.writer import Part, PartTask

        task = PartTask(Part(key.part, "full", self._ids), True, (4, 8, 12))
        message = pickle.dumps(Piece(key.teacher, task, self._texts, None, {}), protocol=5)
        self.bytes = len(message)
        self._queue.append(Event(worker, key, _answer(key)))

    def wait(self, seconds: float) -> Sequence[Event]:  # noqa: ARG002
        joined = [Event(name, None, About(name)) for name in self._joining]
        self._joining = []
        events = joined + [self._queue.popleft() for _ in range(min(len(self._queue), 8))]
        return pickle.loads(pickle.dumps(events))  # type: ignore[no-any-return]

    def drop(self, worker: str) -> None: ...

    def may_grow(self) -> bool:
        return bool(self._joining)


def _answer(key: Key) -> Outcome:
    if not key.part:
        return Fitted(key.teacher, {}, 1.0)
    files = {f"teachers/{key.teacher}/{key.part}/{number}": FileDigest(1 << 20, "0" * 64) for number in range(FILES)}
    return Written(key.teacher, key.part, 30_000, files, 1024, 0, 30_000, 1 << 24, 1.0)


if __name__ == "__main__":
    main()
