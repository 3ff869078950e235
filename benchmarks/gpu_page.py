"""Writes the tables of docs/gpu.md, between two marks, from the results of ``gpu.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pieces
from gpu_material import BATCH
from page import number, table

Results = Mapping[str, Mapping[str, Any]]
EPOCHS, ROWS = 3, 100_000  # of the students whose cost is compared
NOTHING = "Nothing has been measured on a GPU yet.\n"


def write(results: Path, page: Path) -> None:
    """Replace what is between the marks of ``page``."""
    found = {name: entry["found"] for name, entry in pieces.known(results).items() if "found" in entry}
    sections = [section(found) for section in (machine, steps, options, dump, students, cofinetune)]
    replace_between(page, "measured", "\n".join(section for section in sections if section) or NOTHING)


def replace_between(page: Path, mark: str, text: str) -> None:
    """Put ``text`` between ``<!-- MARK: begin -->`` and ``<!-- MARK: end -->``."""
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->\n"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def machine(found: Results) -> str:
    facts = next((values["machine"] for values in found.values() if "machine" in values), None)
    return "" if facts is None else ", ".join(f"{key} {value}" for key, value in facts.items()) + "\n"


def steps(found: Results) -> str:
    """One table per student."""
    parts = []
    for name, values in _named(found, "steps, "):
        ours = values["3 teachers"]
        idle, peaks = ours.get("idle share of the GPU", {}), ours["peak memory, MB"]
        rows = [
            [
                contender,
                number(rate),
                f"{idle[contender]:.1%}" if contender in idle else "",
                f"{peaks[contender]['gpu_peak_mb']:,.0f}",
            ]
            for contender, rate in ours["steps per second"].items()
        ]
        ratios = [[pair, number(value)] for pair, value in ours["ratio of steps per second"].items()]
        parts.append(
            f"### A step of a student with {name}\n\n"
            + table(["", "steps/s", "the GPU is idle", "peak memory of the GPU, MB"], rows)
            + "\n"
            + table(["ratio of steps/s", ""], ratios)
        )
    return "\n".join(parts)


def options(found: Results) -> str:
    usual = found.get("steps, 6 layers")
    named = _named(found, "options, ")
    if not named or usual is None:
        return ""
    before = usual["3 teachers"]["steps per second"]
    rows = [["", number(before["fine-tune"]), number(before["cached"])]]
    for name, values in named:
        rates = values["3 teachers"]["steps per second"]
        rows.append([f"`{name}`", number(rates["fine-tune"]), number(rates["cached"])])
    return "### Options\n\n" + table(["steps/s, 6 layers", "fine-tune", "cached"], rows)


def dump(found: Results) -> str:
    rows = []
    for name, values in _named(found, "dump, "):
        (measured,) = values[name.split(", ")[0]].values()
        taken = measured["time of the dump / time of the bare loop"]["median"]
        rows.append([name, *_rates(measured), f"{1 / taken:.3f}"])
    if not rows:
        return ""
    head = ["backend, precision, stored", "bare loop, texts/s", "dump, texts/s", "dump / bare loop"]
    return "### The dump of one teacher\n\n" + table(head, rows)


def _rates(measured: Mapping[str, Any]) -> list[str]:
    return [number(measured["bare, rows per second"]), number(measured["dump, rows per second"])]


def students(found: Results) -> str:
    """Minutes for some students with the cache, its dump included, and with live teachers."""
    taught, dumped = _named(found, "steps, "), _named(found, "dump, torch, bf16, int8")
    if not taught or not dumped:
        return ""
    (measured,) = dumped[0][1]["torch"].values()
    once = 3 * ROWS / measured["dump, rows per second"]["median"]
    rows = []
    for name, values in taught:
        rates = {key: rate["median"] for key, rate in values["3 teachers"]["steps per second"].items()}
        seconds = {key: EPOCHS * ROWS / BATCH / rate for key, rate in rates.items()}
        for count in (1, 3, 10):
            cached, live = once + count * seconds["cached"], count * seconds["live"]
            rows.append([name, str(count), f"{cached / 60:.1f}", f"{live / 60:.1f}", f"{live / cached:.2f}"])
    about = f"Minutes for {ROWS:,} texts, three teachers, students of {EPOCHS} epochs, from the figures above.\n\n"
    head = ["student", "students", "with the cache and its dump", "with live teachers", "live / cached"]
    return "### The cost of several students\n\n" + about + table(head, rows)


def cofinetune(found: Results) -> str:
    values = found.get("cofinetune")
    if values is None:
        return ""
    runs = {name: one for name, one in values.items() if isinstance(one, dict) and "seconds" in one}
    rows: Sequence[Sequence[str]] = [[name, number(one["seconds"])] for name, one in runs.items()]
    ratio = number(values["seconds together / sum of seconds alone"])
    return "### Co-finetuning\n\n" + table(["run", "seconds"], rows) + f"\nTogether / sum of alone: {ratio}\n"


def _named(found: Results, begin: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The results whose names begin so, by the rest of their names."""
    return [(name.removeprefix(begin), values) for name, values in found.items() if name.startswith(begin)]
