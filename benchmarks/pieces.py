"""Measurements in pieces of some minutes: each result is one line of a file, and what is there is not run again.

For machines that are lent for a short time. ``gpu.py`` and ``full.py`` are made of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Piece:
    """A named command. ``result`` makes the values of the line from what it printed on stdout.

    ``makes``: a file that it leaves. Where that is missing, it runs again: a machine may be a fresh one.
    """

    name: str
    command: Sequence[str]
    result: Callable[[str], dict[str, Any]] = json.loads
    makes: Path | None = None


def arguments(parser: argparse.ArgumentParser, results: Path) -> None:
    """Add the flags that every program in pieces has."""
    parser.add_argument("--results", type=Path, default=results, help="the file of the results, one line of JSON each")
    parser.add_argument("--minutes", type=float, default=9.5, help="time of this call; the rest is left for the next")
    parser.add_argument("--only", nargs="*", metavar="PIECE", help="pieces whose names begin so")


def known(results: Path) -> dict[str, dict[str, Any]]:
    """The results so far by name; a line that was cut short does not count."""
    found: dict[str, dict[str, Any]] = {}
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["piece"]] = entry
    return found


def run(pieces: Sequence[Piece], given: argparse.Namespace) -> int:
    """Run what is missing, as far as the time goes; returns how many pieces are left.

    A piece that the end of the time interrupts is run first in the next call. SystemExit if a piece fails.
    """
    end = time.monotonic() + 60 * given.minutes
    chosen = [piece for piece in pieces if not given.only or any(piece.name.startswith(name) for name in given.only)]
    missing = [piece for piece in chosen if not _is_done(piece, given.results)]
    print(f"{len(chosen) - len(missing)} of {len(chosen)} pieces are there", file=sys.stderr, flush=True)
    for place, piece in enumerate(missing):
        left = end - time.monotonic()
        if left <= 0 or not _run(piece, given.results, left):
            return len(missing) - place
    return 0


def _is_done(piece: Piece, results: Path) -> bool:
    return "found" in known(results).get(piece.name, {}) and (piece.makes is None or piece.makes.exists())


def _run(piece: Piece, results: Path, seconds: float) -> bool:
    """Run a piece for at most ``seconds``; False if it did not end."""
    print(f"{piece.name}: $ {' '.join(map(_shown, piece.command))}", file=sys.stderr, flush=True)
    spent, began = known(results).get(piece.name, {}).get("seconds", 0.0), time.monotonic()
    try:
        done = subprocess.run(list(piece.command), stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        _append(results, {"piece": piece.name, "seconds": round(spent + time.monotonic() - began, 1)})
        print(f"{piece.name}: interrupted; the next call continues", file=sys.stderr)
        return False
    if done.returncode:
        raise SystemExit(f"{piece.name} failed with exit code {done.returncode}")
    taken = round(spent + time.monotonic() - began, 1)
    command = " ".join(_shown(word) for word in piece.command)
    _append(results, {"piece": piece.name, "seconds": taken, "command": command, "found": piece.result(done.stdout)})
    return True


def _shown(word: str) -> str:
    """A word of a command as a reader types it in the repository."""
    return "python" if word == sys.executable else word.replace(str(HERE), HERE.name)


def _append(results: Path, entry: dict[str, Any]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    whole = not results.exists() or results.read_bytes().endswith(b"\n") or not results.stat().st_size
    with results.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())
