"""The fuzzing program: half a minute of it, and that it would find what it looks for."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kdcache.testing.fuzz import Finding
from kdcache.testing.fuzz_targets import KINDS

PLANTED = """
    import ctypes, os, sys, time
    from kdcache.errors import DamageError, RecipeError
    from kdcache.testing.fuzz import main
    from kdcache.testing.fuzz_targets import Attempt

    def crash(): ctypes.string_at(0)
    def abort(): os.abort()
    def hang():
        while True: pass
    def memory(): bytearray(8 << 30)
    def surprise(): {}["key"]
    def rude(): raise DamageError("x" * 5000)
    def wrong(): raise RecipeError("an exit code that is not allowed")
    def refused(): raise DamageError("as it should be")
    def fine(): pass

    READS = [fine, refused, crash, fine, abort, hang, memory, surprise, rude, wrong, fine, refused]

    def kind(place):
        reads = iter(range(100))
        def target(rng):
            number = int(rng.random() * 0) + rng.number
            return Attempt({"a/b": bytes([number])}, READS[number])
        return target

    import kdcache.testing.fuzz as fuzz
    before = fuzz.Fuzzer._random
    def numbered(self, kind, number):
        rng = before(self, kind, number)
        rng.number = number
        return rng
    fuzz.Fuzzer._random = numbered
    sys.exit(main(sys.argv[1:], {"planted": kind}))
"""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment, timeout=280)


def test_half_a_minute_without_a_finding(tmp_path: Path) -> None:
    """A slow machine gets less far and does not fail."""
    done = run("-m", "kdcache.testing.fuzz", "--seconds", 25, "--seed", 0, "--findings", tmp_path / "found")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(kind in done.stdout for kind in KINDS) and not (tmp_path / "found").exists()


def test_what_it_looks_for_is_found_kept_and_told_apart(tmp_path: Path) -> None:
    program = tmp_path / "planted.py"
    program.write_text(textwrap.dedent(PLANTED))
    done = run(program, "--seconds", 200, "--cases", 12, "--limit", 1, "--findings", tmp_path / "found")
    assert done.returncode == 1, done.stdout + done.stderr
    outcomes = {}
    for place in (tmp_path / "found").iterdir():
        said = json.loads((place / "case.json").read_text())
        outcomes[said["number"]] = said["outcome"]
        assert said["alone"] and f"--case {said['number']}" in said["command"]
        assert (place / "a+b").read_bytes() == bytes([said["number"]])
    assert outcomes.keys() == {2, 4, 5, 6, 7, 8, 9}, done.stdout
    for number, wanted in {
        2: "SIGSEGV",
        4: "SIGABRT",
        5: "processor time",
        6: "MemoryError",
        7: "KeyError",
        8: "5000",
    }.items():
        assert wanted in outcomes[number], outcomes
    assert "planted" in done.stdout and "7 findings" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_is_the_same_again_from_its_seed_and_number(tmp_path: Path, kind: str) -> None:
    first, second = (KINDS[kind](tmp_path / name) for name in ("a", "b"))
    for number in range(20):
        one, other = (dict(target(random.Random(f"{kind}/0/{number}")).files) for target in (first, second))
        if kind not in (
            "refs",
            "journal",
        ):  # a ref has its time and its writer's token, a record of a dump its victim's
            assert one == other
        assert one.keys() == other.keys()


def test_the_command_of_a_finding_runs_its_case() -> None:
    command = Finding("tokenizer", 0, 3, "", alone=True).command.split()
    done = run(*command[1:])
    assert done.returncode == 0 and done.stdout.strip() in ("read", "refused"), done.stderr
