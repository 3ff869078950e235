"""Freed memory stays, or goes, as the process was told: counted in pages that had to come anew."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

GLIBC = platform.libc_ver()[0] == "glibc"
PROGRAM = """
import resource
import numpy as np
from kdcache.cache.memory import {name}

told, faults = {name}(), []
for _ in range(5):
    np.ones(8 << 20)  # 64 MB, more than glibc keeps by itself
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(told, faults[-1] - faults[0])
"""


def run(name: str, **environment: str) -> tuple[bool, int]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM.format(name=name)]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    told, faults = done.stdout.split()
    return told == "True", int(faults)


def test_a_large_block_is_had_again_without_new_pages() -> None:
    told, faults = run("keep_freed_blocks")
    assert told is GLIBC
    if GLIBC:
        assert faults < 16


@pytest.mark.parametrize("said", ["MALLOC_ARENA_TEST_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_stays(said: str) -> None:
    told, faults = run("keep_freed_blocks", **{said: "8" if said.startswith("MALLOC") else "glibc.malloc.arena_test=8"})
    assert not told
    assert faults > 16 or not GLIBC  # at least the huge pages


def test_large_blocks_go_back() -> None:
    told, faults = run("give_back_large_blocks")
    assert told is GLIBC
    assert faults > 16 or not GLIBC
