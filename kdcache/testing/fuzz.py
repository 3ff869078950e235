"""Fuzzing: damaged and forged files and responses, read as a student or a command reads them.

    python -m kdcache.testing.fuzz --minutes 60 --seed 0
    python -m kdcache.testing.fuzz --kind arrow --kind manifest --seconds 30
    python -m kdcache.testing.fuzz --kind arrow --seed 0 --case 17        # one case again, with its traceback

Each case is a function of kind, seed and number. It must be read, or refused by a one-line error of kdcache with an
allowed exit code. Anything else is a finding: another exception, a signal that ends the process, more CPU time than
``--limit`` seconds, more memory than ``--memory``. Cases run one after the other in a child process. The child writes
the number of the current case to shared memory, so the parent knows which case killed it. Each finding gets a directory
with ``case.json`` and the changed files.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kdcache.errors import KdcacheError
from kdcache.files import use_disk
from kdcache.testing.faults import UnsyncedDisk
from kdcache.testing.fuzz_targets import KINDS, Target

LIMIT = 20.0  # seconds of processor time of one case
MEMORY = 2 << 30  # bytes by which the address space of a child may grow
MESSAGE = 2000  # characters of an error
SLICE = 5.0  # seconds of one kind before the next one
PER_CHILD = 20_000  # cases per child, so that leftovers of cases do not accumulate
_STUCK = 600.0  # seconds of wall time without a new case, after which a child is killed
_STATE = struct.Struct("<qqq")  # number of the case, number of cases read, number of cases refused


@dataclass(frozen=True)
class Finding:
    """A case that was neither read nor refused. ``alone``: whether it also happens in a separate process."""

    kind: str
    seed: int
    number: int
    outcome: str
    alone: bool
    details: str = ""

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return f"python -m kdcache.testing.fuzz --kind {self.kind} --seed {self.seed} --case {self.number}"


@dataclass
class Tally:
    """Cases of one kind."""

    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """The number of all cases."""
        return self.read + self.refused + len(self.findings)


Kinds = Mapping[str, Callable[[Path], Target]]


@dataclass(frozen=True)
class Fuzzer:
    """The settings of a run."""

    kinds: Kinds
    place: Path  # of the victims
    seed: int
    limit: float = LIMIT
    memory: int = MEMORY
    keep: Path | None = None  # directory of findings

    def run(self, seconds: float, cases: int | None = None, note: Callable[[str], None] = print) -> dict[str, Tally]:
        """Run all kinds in turn, until the time is over (also on a slow machine) or each has run so many cases."""
        tallies = {kind: Tally() for kind in self.kinds}
        targets = {kind: self._victim(kind) for kind in self.kinds}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            left = [kind for kind in self.kinds if cases is None or tallies[kind].cases < cases]
            if not left:
                break
            for number, kind in enumerate(left):
                share = (end - time.monotonic()) / (len(left) - number)
                if share > 0:
                    most = PER_CHILD if cases is None else min(PER_CHILD, cases - tallies[kind].cases)
                    self._slice(kind, targets[kind], tallies[kind], min(SLICE, share), most, note)
        return tallies

    def case(self, kind: str, number: int) -> str:
        """Run one case in this process; returns its result. Raises the exception of a finding."""
        return self._one(self._victim(kind), kind, number)

    def _victim(self, kind: str) -> Target:
        place = self.place / kind
        place.mkdir(parents=True)
        with use_disk(UnsyncedDisk()):
            return self.kinds[kind](place)

    def _slice(
        self, kind: str, target: Target, tally: Tally, seconds: float, most: int, note: Callable[[str], None]
    ) -> None:
        """Run some cases in a child. If it dies, its current case is a finding, and the next one continues after it."""
        first, began = tally.cases, time.monotonic()
        state, found = self._child(target, kind, range(first, first + most), seconds)
        tally.seconds += time.monotonic() - began
        tally.read += state.read
        tally.refused += state.refused
        for number, outcome, details in found:
            alone = bool(self._child(target, kind, range(number, number + 1), _STUCK)[1])
            finding = Finding(kind, self.seed, number, outcome, alone, details)
            tally.findings.append(finding)
            note(f"finding: {kind} case {number}: {outcome}{'' if alone else ' (not alone)'}")
            self._save(target, finding)

    def _child(
        self, target: Target, kind: str, numbers: range, seconds: float
    ) -> tuple[Tally, list[tuple[int, str, str]]]:
        """Run cases in a child process; returns the counts of cases read and refused, and the findings."""
        shared = mmap.mmap(-1, _STATE.size)
        _STATE.pack_into(shared, 0, numbers.start, 0, 0)
        report = self.place / "report.jsonl"
        report.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            self._work(target, kind, numbers, seconds, shared, report)
        status = _wait(child, shared)
        number, read, refused = _STATE.unpack_from(shared)
        lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
        found: list[tuple[int, str, str]] = [tuple(json.loads(line)) for line in lines]
        if status:
            found.append((number, _outcome(status, self.limit), ""))
        return Tally(read, refused), found

    def _work(self, target: Target, kind: str, numbers: range, seconds: float, shared: mmap.mmap, report: Path) -> None:
        """In the child: never returns."""
        try:
            _bound_memory(self.memory)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process at any point
            end, read, refused = time.monotonic() + seconds, 0, 0
            for number in numbers:
                _STATE.pack_into(shared, 0, number, read, refused)
                signal.setitimer(signal.ITIMER_PROF, self.limit)
                try:
                    outcome = self._one(target, kind, number)
                    read, refused = read + (outcome == "read"), refused + (outcome != "read")
                except BaseException as error:
                    line = [number, f"{type(error).__name__}: {error}"[:500], traceback.format_exc()[-8000:]]
                    with report.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                _STATE.pack_into(shared, 0, number, read, refused)
                if time.monotonic() > end:
                    break
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _one(self, target: Target, kind: str, number: int) -> str:
        attempt = target(self._random(kind, number))
        try:
            with use_disk(UnsyncedDisk()):
                attempt.read()
        except KdcacheError as error:
            if error.exit_code not in attempt.allowed:
                raise
            if len(error.message) > MESSAGE:
                raise AssertionError(
                    f"a message of {len(error.message)} characters: {error.message[:300]!r}"
                ) from error
            return "refused"
        return "read"

    def _random(self, kind: str, number: int) -> random.Random:
        return random.Random(f"{kind}/{self.seed}/{number}")

    def _save(self, target: Target, finding: Finding) -> None:
        if self.keep is None:
            return
        place = self.keep / f"{finding.kind}-{finding.seed}-{finding.number}"
        place.mkdir(parents=True, exist_ok=True)
        said = {**asdict(finding), "command": finding.command}
        (place / "case.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        for name, data in target(self._random(finding.kind, finding.number)).files.items():
            (place / name.replace("/", "+")[-200:]).write_bytes(data)


def _bound_memory(more: int) -> None:
    """Limit the growth of the address space of this process: allocations beyond it fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 1 << 20
    size = pages * resource.getpagesize() + more
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


def _wait(child: int, shared: mmap.mmap) -> int:
    """The exit status of a child; a child without progress is killed."""
    before, since = shared[:], time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        now = time.monotonic()
        if shared[:] != before:
            before, since = shared[:], now
        elif now - since > _STUCK:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def _outcome(status: int, limit: float) -> str:
    number = os.waitstatus_to_exitcode(status)
    if number == -signal.SIGPROF:
        return f"more than {limit:g} seconds of processor time"
    if number == -signal.SIGKILL:
        return "killed: it stood still, or took too much memory"
    return f"ended by {signal.Signals(-number).name}" if number < 0 else f"ended with {number}"


def summary(tallies: Mapping[str, Tally]) -> str:
    """A table of cases, rates and findings by kind."""
    lines = [f"{'kind':<12} {'cases':>10} {'per second':>11} {'read':>10} {'refused':>10} {'findings':>9}"]
    for kind, one in tallies.items():
        rate = one.cases / one.seconds if one.seconds else 0.0
        lines.append(
            f"{kind:<12} {one.cases:>10,} {rate:>11,.0f} {one.read:>10,} {one.refused:>10,} {len(one.findings):>9,}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, kinds: Kinds = KINDS) -> int:
    """The program; returns 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m kdcache.testing.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--kind", action="append", choices=list(kinds), help="what to attack; all unless given, may be repeated"
    )
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--cases", type=int, help="of each kind, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone, in this process; needs one --kind")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds of processor time of one case ({LIMIT:g})")
    parser.add_argument("--memory", type=int, default=MEMORY, help=f"bytes by which a process may grow ({MEMORY})")
    parser.add_argument(
        "--findings", type=Path, default=Path("fuzz-findings"), help="directory that findings are written to"
    )
    options = parser.parse_args(arguments)
    chosen = {kind: kinds[kind] for kind in options.kind or kinds}
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="kdcache-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        fuzzer = Fuzzer(chosen, place, options.seed, options.limit, options.memory, options.findings)
        if options.case is not None:
            if len(chosen) != 1:
                parser.error("--case needs one --kind")
            print(fuzzer.case(next(iter(chosen)), options.case))
            return 0
        seconds = 60 * options.minutes + options.seconds or 60.0
        tallies = fuzzer.run(seconds, options.cases, lambda line: print(line, flush=True))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(summary(tallies))
    found = [finding for one in tallies.values() for finding in one.findings]
    if found:
        print(f"{len(found)} findings in '{options.findings}'; the first again: {found[0].command}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
