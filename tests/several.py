"""Runs commands of kdcache in several processes, as torchrun starts them, and prints what became of each.

    python tests/several.py SCENARIOS

SCENARIOS is a JSON list of ``Scenario``. A process imports everything once and forks the processes of each scenario,
which takes a fraction of a second. Prints a JSON list: per scenario and rank, exit status, stdout and stderr.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdcache.cli.main import main as kdcache
from kdcache.distill.stage import DistillTask
from kdcache.students import speed
from kdcache.teachers.joint import CofinetuneTask
from kdcache.training import checkpoints
from tests.distill.killed import import_all

_SECONDS = 120.0  # after which a process hangs: far more than any needs on a busy machine


@dataclass(frozen=True)
class Scenario:
    """A command in ``world`` processes.

    ``at``: rank -> ``kill:N``, ``raise:N`` or ``interrupt:N`` in its step N; ``write:N`` is killed before its N-th file
    of a checkpoint; ``count:N`` says in step N how many numbers the parameters of the process have.
    """

    command: Sequence[str]
    world: int = 1
    at: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a process ended; ``code`` is negative for a signal."""

    code: int
    out: str
    err: str


def run_all(scenarios: Sequence[Scenario]) -> list[list[Ended]]:
    """Run ``scenarios`` one after the other in processes that a new interpreter forks; for tests."""
    import subprocess

    given = json.dumps([asdict(scenario) for scenario in scenarios])
    command = [sys.executable, "-m", "tests.several", given]
    environment = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as ``processes.join`` sets it before torch is loaded
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return [[Ended(**ended) for ended in scenario] for scenario in found]


def _run(scenario: Scenario) -> list[Ended]:
    with socket.socket() as free, tempfile.TemporaryDirectory() as place:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        children = [_start(scenario, rank, port, Path(place)) for rank in range(scenario.world)]
        codes = _wait(children)
        said = [[(Path(place) / f"{name}.{rank}").read_text() for name in ("out", "err")] for rank in range(len(codes))]
    return [Ended(code, *texts) for code, texts in zip(codes, said, strict=True)]


def _start(scenario: Scenario, rank: int, port: int, place: Path) -> int:
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests in the background ignores it
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / f"{name}.{rank}", os.O_CREAT | os.O_WRONLY), number)
    if scenario.world > 1:
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": scenario.world, "LOCAL_WORLD_SIZE": scenario.world}
        os.environ |= {name: str(value) for name, value in given.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    kind, _, number = scenario.at.get(str(rank), "").partition(":")
    if kind == "write":
        checkpoints._write = _ending(checkpoints._write, "kill", int(number))
    else:
        for task in (DistillTask, CofinetuneTask) if kind else ():
            task.losses = _ending(task.losses, kind, int(number))  # type: ignore[attr-defined]
    code = 1
    try:
        kdcache(scenario.command)
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(children: Sequence[int]) -> list[int]:
    codes: dict[int, int] = {}
    until = time.monotonic() + _SECONDS
    while len(codes) < len(children):
        for child in [child for child in children if child not in codes]:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


def _ending(losses: Callable[..., Any], kind: str, at: int) -> Callable[..., Any]:
    """``losses``, but the process ends in its call number ``at``, or counts."""
    calls = 0

    def called(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            if kind == "raise":
                raise ValueError("no luck")
            if kind == "count":
                print(f"parameters: {_parameters()}")
                return losses(*args)
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGINT)
        return losses(*args)

    return called


def _parameters() -> int:
    """The numbers in all parameters that this process has in memory."""
    objects = [each for each in gc.get_objects() if issubclass(type(each), torch.nn.Parameter)]
    return sum(parameter.numel() for parameter in objects if parameter.device.type != "meta")


def main(scenarios: str) -> None:
    import torch.distributed.rendezvous

    import_all()
    speed._LATENCY_TEXTS, speed._THROUGHPUT_TEXTS = 2, 4
    torch.nn.Dropout.forward = lambda _self, states: states  # type: ignore[method-assign,assignment]
    print(json.dumps([[asdict(ended) for ended in _run(Scenario(**given))] for given in json.loads(scenarios)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
