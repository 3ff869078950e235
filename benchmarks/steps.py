"""Measures a student's step: plain, from the cache, from targets in memory, from soft labels only, with live teachers.

    python benchmarks/steps.py RECIPE --teachers runs/quickstart/teachers --cache runs/quickstart/cache
    python benchmarks/steps.py RECIPE --teachers runs/sst2/teachers --cache runs/sst2/cache --set KEY=VALUE ...
    python benchmarks/steps.py ... --contenders cached --set distill.compile=true   # or tf32, fused_adamw=false
    python benchmarks/steps.py ... --contenders cached --dense-embeddings   # gradients of all rows, as in 0.1.0
    python benchmarks/steps.py ... --free-running      # on a GPU: as in training, without waiting between the phases

Every contender trains the same student on the same rows. Contenders are interleaved: some steps of one, then some of
the next. Plain fine-tuning has its own order of rows, so a turn must be long enough to have batches of all lengths.
`memory` is the step of `cached` with its targets in the memory of the device: the difference is the time of the cache.
On a GPU its peak memory includes those of the batches that it repeats.
`ideal` for `cached` against `fine-tune` is student FLOPs / (student + projection FLOPs), counted by torch. `predicted`
for `live` is a step plus the teachers' forward passes, measured alone on the same batches. Peak memory is that of a
process with one contender. Prints JSON.

With ``--free-running`` the host never waits for a GPU, and the next batch is copied while a step runs, as in training.
Instead of phases there is the idle share of the GPU: 1 - the time in which a kernel runs, of some steps under torch's
profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import in_a_process, machine, peak_memory_mb, ratio, rounds, summary

from kdcache.cache.memory import keep_freed_blocks
from kdcache.cache.reader import open_cache
from kdcache.distill.setup import Training, prepare
from kdcache.distill.stage import compiled_student
from kdcache.loading.transfer import on_device, pack
from kdcache.progress import SilentProgress
from kdcache.recipe import load_recipe
from kdcache.teachers.network import takes_full_mask
from kdcache.training.device import default_device, float32_products
from kdcache.training.optim import adamw
from kdcache.training.row_gradients import RowGradients

if TYPE_CHECKING:
    from kdcache.distill.objective import DistillationModel
    from kdcache.loading.targets import Batch

CONTENDERS = ("fine-tune", "cached", "memory", "logits only", "live")
METHODS = {"fine-tune": ["distill.method=fine-tune"], "logits only": ["distill.weights.hidden=0.0"]}
IN_MEMORY = 64  # batches of `memory`
LIVE_SHARE = 4  # steps of the others per step with live teachers, which takes about ten times as long
PHASES = ("data", "forward", "loss", "backward", "optimizer")


def main() -> None:
    arguments = parse()
    if arguments.alone:
        runner = Runner.of(arguments.alone, arguments, arguments.counts[0])
        runner.steps(2)  # warm-up
        found = {"steps/s": arguments.steps / runner.steps(arguments.steps), "peak_mb": peak_memory_mb()}
        runner.close()
        json.dump(found | {"gpu_peak_mb": torch.cuda.max_memory_allocated() / 1e6}, sys.stdout)
        return
    report: dict[str, Any] = {"machine": machine(), "recipe": arguments.recipe, "steps per turn": arguments.steps}
    for count in arguments.counts:
        print(f"{count} teachers", file=sys.stderr, flush=True)
        report[f"{count} teachers"] = compare(arguments, count)
    json.dump(report, sys.stdout, indent=2)
    print()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--teachers", type=Path, required=True, help="directory of the co-finetuned teachers")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 2, 3], help="numbers of teachers to measure with")
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--warm-up", type=int, default=2, help="steps before; compiled graphs need more")
    parser.add_argument(
        "--steps", type=int, default=20, help="of one contender's turn; a quarter of it with live teachers"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--dense-embeddings", action="store_true", help="on a CPU: a gradient of all rows in each micro-batch"
    )
    parser.add_argument(
        "--free-running", action="store_true", help="do not wait for a GPU between the phases of a step"
    )
    parser.add_argument("--alone", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    there = len(open_cache(arguments.cache).teachers)
    arguments.counts = [count for count in arguments.counts if count <= there]
    return arguments


def compare(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    """All contenders with the first ``count`` teachers of the cache: steps per second, ratios, phases, memory."""
    runners = {name: Runner.of(name, arguments, count) for name in arguments.contenders}
    for runner in runners.values():
        runner.steps(arguments.warm_up)  # allocations, kernels, digests of the first parts
        runner.seconds = dict.fromkeys(PHASES, 0.0)
    steps = {name: max(1, arguments.steps // (LIVE_SHARE if name == "live" else 1)) for name in runners}
    turns = rounds(
        {name: functools.partial(runner.steps, steps[name]) for name, runner in runners.items()}, arguments.rounds
    )
    rates = {name: [steps[name] / seconds for seconds in taken] for name, taken in turns.items()}
    found: dict[str, Any] = {"steps per second": {name: summary(values) for name, values in rates.items()}}
    pairs = [
        ("cached", "memory"),
        ("cached", "fine-tune"),
        ("logits only", "fine-tune"),
        ("live", "fine-tune"),
        ("cached", "live"),
    ]
    found["ratio of steps per second"] = {
        f"{one} / {other}": ratio(rates[one], rates[other]) for one, other in pairs if one in rates and other in rates
    }
    if not arguments.free_running:
        found["share of time"] = {name: runner.shares() for name, runner in runners.items()}
    elif torch.cuda.is_available():
        found["idle share of the GPU"] = {name: runner.idle(steps[name]) for name, runner in runners.items()}
    if "cached" in runners and "fine-tune" in runners:
        plain, taught = runners["fine-tune"].flops(), runners["cached"].flops()
        found["ideal cached / fine-tune by FLOPs"] = plain / taught
    if "live" in runners and "cached" in runners:
        found["teachers alone"] = predict(runners, arguments, statistics_of=rates)
    for runner in runners.values():
        runner.close()
    settings = [flag for override in arguments.overrides for flag in ("--set", override)]
    settings += ["--dense-embeddings"] if arguments.dense_embeddings else []
    settings += ["--free-running"] if arguments.free_running else []
    common = [arguments.recipe, "--teachers", str(arguments.teachers), "--cache", str(arguments.cache), *settings]
    found["peak memory, MB"] = {
        name: in_a_process("steps.py", [*common, "--counts", str(count), "--steps", "10", "--alone", name])
        for name in runners
    }
    return found


def predict(
    runners: dict[str, Runner], arguments: argparse.Namespace, *, statistics_of: dict[str, list[float]]
) -> dict[str, Any]:
    """Seconds per step of the teachers' forward passes, and the predicted rate with live teachers."""
    live = runners["live"]
    seconds = summary([live.teachers_alone() for _ in range(max(3, arguments.rounds // 2))])
    fed = summary([1 / rate for rate in statistics_of["memory" if "memory" in statistics_of else "cached"]])
    predicted = 1 / (seconds["median"] + fed["median"])
    return {
        "seconds per step": seconds,
        "predicted steps per second, live": predicted,
        "predicted speed-up of the cache": 1 / fed["median"] / predicted,
    }


@dataclass
class Runner:
    """One contender: a student, its optimizer, and an endless stream of batches."""

    name: str
    training: Training
    model: DistillationModel
    optimizer: torch.optim.Optimizer
    batches: Iterator[Batch]
    accumulation: int
    autocast: bool
    device: torch.device
    rows: RowGradients | None  # of word embeddings
    settings: contextlib.ExitStack  # compiled graphs and TF32, until it is closed
    free: bool = False  # the host does not wait for the device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    ready: Iterator[tuple[Any, Sequence[Batch]]] | None = None  # counts and pieces of steps, on the device
    fed: Iterator[tuple[Any, Sequence[Batch]]] | None = None  # the same, on their way to the device

    @classmethod
    def of(cls, name: str, arguments: argparse.Namespace, count: int) -> Runner:
        names = list(open_cache(arguments.cache).teachers)[:count]
        overrides = [
            *arguments.overrides,
            *METHODS.get(name, ["distill.method=mt-bert"]),
            f"distill.teachers={json.dumps(names)}",
        ]
        recipe = load_recipe(arguments.recipe, overrides)
        live = arguments.teachers if name == "live" else None
        training = prepare(recipe, arguments.cache, arguments.cache.parent, live, SilentProgress())
        device = default_device()
        if device.type == "cpu":
            keep_freed_blocks()  # as in the stage
        torch.manual_seed(0)
        section, model = recipe.distill, training.model()
        eager = device.type != "cpu" and not section.compile
        model.student.full_mask = eager and takes_full_mask(model.student.network, training.student.max_length)
        model = model.to(device).train()
        options = contextlib.ExitStack()
        options.enter_context(float32_products(section.tf32))
        options.enter_context(compiled_student(training))
        plain = section.compile or arguments.dense_embeddings
        batches = repeated(training) if name == "memory" else endless(training.source.batches)
        made = cls(
            name,
            training,
            model,
            adamw(model.named_parameters(), section.learning_rate, section.weight_decay, fused=section.fused_adamw),
            batches,
            section.accumulation,
            section.precision == "bf16",
            device,
            None if plain else RowGradients(model),
            options,
            arguments.free_running,
        )
        if name == "memory" and device.type != "cpu":
            made.ready = itertools.cycle([made.placed(*one) for one in itertools.islice(made.on_host(), IN_MEMORY)])
        return made

    def steps(self, count: int) -> float:
        """Seconds of ``count`` optimizer steps; adds the time of each phase to ``seconds``."""
        began = time.perf_counter()
        for _ in range(count):
            self.step()
        if self.free and self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def idle(self, count: int) -> float:
        """The share of the time of ``count`` steps in which no kernel runs on the GPU."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            seconds = self.steps(count)
        spans = [event.time_range for event in profiler.events() if event.device_type.name == "CUDA"]
        return 1 - busy([(span.start, span.end) for span in spans]) / (1e6 * seconds)

    def pieces(self) -> tuple[Any, Sequence[Batch]]:
        """Counts of the next step, and its micro-batches on the device."""
        if self.ready is not None:
            return next(self.ready)
        if self.free and self.device.type != "cpu":
            if self.fed is None:
                self.fed = on_device(self.on_host, self.device, in_thread=self.name != "live")
            return next(self.fed)
        counts, pieces = next(self.on_host())
        return (counts, pieces) if self.device.type == "cpu" else self.placed(counts, pieces)

    def placed(self, counts: Any, pieces: Sequence[Batch]) -> tuple[Any, Sequence[Batch]]:
        """With the pieces on the accelerator."""
        return counts, pack(pieces, pin=self.device.type == "cuda").to(self.device)

    def on_host(self) -> Iterator[tuple[Any, tuple[Batch, ...]]]:
        for batch in self.batches:
            yield self.model.counts([batch]), batch.split(self.accumulation)

    def step(self) -> None:
        clock = Clock(self.seconds, self.device, wait=not self.free)
        counts, pieces = self.pieces()
        clock.lap("data")
        for piece in pieces:
            precision = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)
            with precision, after(self.model.student, lambda: clock.lap("forward")):
                loss, _ = self.model(piece, counts)
            clock.lap("loss")
            loss.backward()
            clock.lap("backward")
        if self.rows is not None:
            self.rows.gather()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.lap("optimizer")

    def shares(self) -> dict[str, float]:
        """Shares of the time of a step."""
        total = sum(self.seconds.values())
        return {phase: round(seconds / total, 4) for phase, seconds in self.seconds.items()}

    def flops(self) -> int:
        """FLOPs of forward and backward pass of one batch; torch counts matrix products."""
        from torch.utils.flop_counter import FlopCounterMode

        self.stop_feeding()
        batch = next(self.batches)
        with FlopCounterMode(display=False) as counter:
            loss, _ = self.model(batch.to(self.device), self.model.counts([batch]))
            loss.backward()
        if self.rows is not None:
            self.rows.gather()
        self.optimizer.zero_grad()
        return int(counter.get_total_flops())

    def teachers_alone(self, steps: int = 4) -> float:
        """Seconds per step for live targets only."""
        self.stop_feeding()
        waits = self.device.type == "cuda"
        if waits:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            next(self.batches)
        if waits:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps

    def close(self) -> None:
        self.settings.close()
        self.stop_feeding()
        close = getattr(self.batches, "close", None)
        if close is not None:
            close()

    def stop_feeding(self) -> None:
        """End the thread that reads ``batches``."""
        if self.fed is not None:
            self.fed.close()  # type: ignore[attr-defined]  # a generator
            self.fed = None


class Clock:
    """Wait for the device, and add the time since the last lap to a phase."""

    def __init__(self, seconds: dict[str, float], device: torch.device, *, wait: bool = True) -> None:
        self._seconds, self._wait, self._last = seconds, wait and device.type == "cuda", time.perf_counter()

    def lap(self, phase: str) -> None:
        if self._wait:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[phase] += now - self._last
        self._last = now


class after:  # noqa: N801 - reads as a phrase
    """Call ``action`` after each forward pass of ``module`` inside the block."""

    def __init__(self, module: torch.nn.Module, action: Callable[[], None]) -> None:
        self._handle = module.register_forward_hook(lambda *_: action())

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def busy(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of ``spans``."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def endless(batches: Callable[[int], Iterator[Batch]]) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from batches(epoch)


def repeated(training: Training) -> Iterator[Batch]:
    """The first batches of the cache, made once."""
    return itertools.cycle(list(itertools.islice(training.source.batches(0), IN_MEMORY)))


if __name__ == "__main__":
    main()
