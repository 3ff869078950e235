"""Writes docs/benchmarks.md from the JSON of the measurements: tables and bars of measured values only.

The JSON and the pictures are in a folder beside the page, with its name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import growth
from bars import bars, short

Report = Mapping[str, Any]
Section = tuple[str, list[str]]  # Markdown, and pictures as SVG

HEAD = (
    "# Benchmarks\n\n"
    "Written by `make bench`: every number is from one run of one program on one machine, its contenders taking turns; "
    "medians, ± the distance of\nthe quartiles. Ratios are formed within a round. Nothing here is copied by hand; "
    "[results](results.md#against-the-goals) says what follows.\n\n"
)


def write(measured: Path, target: Path) -> None:
    """Write the page, with a section for each existing file, and its folder."""
    folder = target.with_suffix("")
    folder.mkdir(exist_ok=True)
    parts = [HEAD]
    for name, section in SECTIONS.items():
        file = measured / f"{name}.json"
        if not file.exists():
            continue
        shutil.copyfile(file, folder / file.name)
        text, pictures = section(json.loads(file.read_text(encoding="utf-8")))
        parts.append(text)
        for number, picture in enumerate(pictures, start=1):
            (folder / f"{name}-{number}.svg").write_text(picture, encoding="utf-8")
            parts.append(f"![{name}]({folder.name}/{name}-{number}.svg)\n")
        parts.append(f"[Everything that was printed]({folder.name}/{file.name})\n")
    target.write_text("\n".join(parts), encoding="utf-8")


def number(found: Mapping[str, float]) -> str:
    """Median ± spread."""
    if found["n"] == 1:
        return short(found["median"])
    return f"{short(found['median'])} ± {short(float(format(found['spread'], '.2g')))}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def opening(title: str, report: Report, about: str) -> str:
    machine = report["machine"]
    facts = ", ".join(f"{key} {value}" for key, value in machine.items())
    return f"## {title}\n\n{about}\n\n    {report['command']}\n\n{facts}\n\n"


def steps(report: Report) -> Section:
    text = opening(
        "A student's step", report,
        "`memory`: the step of `cached` with its targets lying ready. `live`: the teachers run in every step. `ideal`: "
        "plain FLOPs / (plain "
        "+ projection FLOPs). `predicted`: from the teachers' forward times alone.",
    )  # fmt: skip
    pictures = []
    for count in [key for key in report if key.endswith("teachers")]:
        found, teachers = report[count], "1 teacher" if count == "1 teachers" else count
        pictures.append(
            bars(f"Steps per second, {teachers}", found["steps per second"], ours=["cached", "logits only"])
        )
        shares, peaks = found["share of time"], found["peak memory, MB"]
        rows = [
            [name, number(rate), *(f"{share:.1%}" for share in shares[name].values()), f"{peaks[name]['peak_mb']:.0f}"]
            for name, rate in found["steps per second"].items()
        ]
        text += f"### {teachers}\n\n" + table(
            ["contender", "steps/s", "data", "forward", "loss", "backward", "optimizer", "peak MB"], rows
        )
        ratios = [[name, number(value)] for name, value in found["ratio of steps per second"].items()]
        if "ideal cached / fine-tune by FLOPs" in found:
            ratios.append(["ideal cached / fine-tune", f"{found['ideal cached / fine-tune by FLOPs']:.3g}"])
        if "teachers alone" in found:
            ratios.append(
                ["predicted cached / live", f"{found['teachers alone']['predicted speed-up of the cache']:.3g}"]
            )
        text += "\n" + table(["ratio of steps/s", ""], ratios) + "\n"
        if "teachers alone" in found and "live" in found["steps per second"]:
            text += students(found) + "\n"
    return text, pictures


def students(found: Report) -> str:
    """Forward passes of the teachers that live and cached runs need, in epochs."""
    teacher = found["teachers alone"]["seconds per step"]["median"]
    cached, live = (1 / found["steps per second"][name]["median"] for name in ("cached", "live"))
    rows = []
    for count in (1, 3, 10):
        once = teacher + count * 3 * cached  # the dump is one pass; each student trains for three epochs
        rows.append([str(count), f"{once:.3g}", f"{count * 3 * live:.3g}", f"{count * 3 * live / once:.2g}"])
    return (
        "Seconds per batch of the data, students trained for 3 epochs, the dump counted as one pass of the "
        "teachers:\n\n" + table(["students", "cached, with the dump", "live", "live / cached"], rows)
    )


def dump(report: Report) -> Section:
    text = opening(
        "The dump",
        report,
        "Time of the dump over a bare forward loop on the same batches; bases are fitted before and apart.",
    )
    rows = [
        [backend, name, number(found["bare, rows per second"]), number(found["dump, rows per second"]),
         number(found["time of the dump / time of the bare loop"]),
         number(found["processor time of the dump / of the bare loop"]), number(found["writing / time of the dump"]),
         f"{found['fitting the bases, s']:.2g}"]
        for backend in ("torch", "onnxruntime") if backend in report for name, found in report[backend].items()
    ]  # fmt: skip
    ratios = {
        f"{name}, {backend}": found["time of the dump / time of the bare loop"]
        for backend in ("torch", "onnxruntime") for name, found in report.get(backend, {}).items()
    }  # fmt: skip
    text += table(
        [
            "backend",
            "teacher",
            "bare, rows/s",
            "dump, rows/s",
            "dump / bare",
            "of the processor",
            "writing / dump",
            "fitting, s",
        ],
        rows,
    )
    return text, [bars("Time of the dump / time of a bare forward loop", ratios, ours=list(ratios), goal=1.05)]


def cofinetune(report: Report) -> Section:
    text = opening("Co-finetuning", report, "All teachers together, and each alone: one epoch over the first rows.")
    names = [name for name, value in report.items() if isinstance(value, dict) and "seconds" in value]
    rows = [[name, number(report[name]["seconds"]), number(report[name]["peak memory, MB"])] for name in names]
    ratio = number(report["seconds together / sum of seconds alone"])
    text += table(["run", "seconds", "peak MB beyond the libraries"], rows) + f"\nTogether / sum of alone: {ratio}\n"
    return text, [bars("Peak memory, MB", {name: report[name]["peak memory, MB"] for name in names})]


def freed(report: Report) -> Section:
    text = opening(
        "Training on the CPU, freed memory kept or given back",
        report,
        "Kept, as kdcache trains, against what glibc does by itself.",
    )
    found = {name: said for name, said in report.items() if isinstance(said, dict) and "kept / given back" in said}
    ways = ("kept", "given back", "kept / given back")
    rows = [
        [name, key, *(number(said[way][key]) for way in ways)] for name, said in found.items() for key in said["kept"]
    ]
    return text + table(["training", "", *ways], rows), []


def scale(report: Report) -> Section:
    text = opening(
        "Growth with the number of rows",
        report,
        "Three teachers, three layers of 8 int8 values, a window of two parts and nothing else kept decoded: what "
        "grows, not how much. Ten thousand rows are three parts, which never fill the window and what is read "
        "ahead. What it means is in [Past ten million texts](scale.md).",
    )
    sizes = [key for key in report if " rows" in key]
    files = [key for key in report if key.startswith("data file, ")]
    read = list(dict.fromkeys(key for file in files for key in report[file]))
    of_files = [[key, *(short(report[file][key]) if key in report[file] else "" for file in files)] for key in read]
    keys = list(dict.fromkeys(key for size in sizes for key in report[size]))
    rows = [[key, *(short(report[size][key]) if key in report[size] else "" for size in sizes)] for key in keys]
    found = text + table(["", *sizes], rows)
    if files:
        found += "\n" + table(["", *(f"{file} rows" for file in files)], of_files)
    return found, [growth.plot(report)]


def loader(title: str) -> Callable[[Report], Section]:
    def section(report: Report) -> Section:
        text = opening(
            title, report, f"{report['rows']} ragged rows of {report['dim']} {report['dtype']}, batches of 32."
        )
        pictures = []
        for regime, name in (("memory", "Everything in memory"), ("window", "A window of 1/8, first epoch")):
            keys = list(next(iter(report[regime].values())))
            rows = [[label, *(number(found[key]) for key in keys)] for label, found in report[regime].items()]
            text += f"### {name}\n\n" + table(["loader", *keys], rows) + "\n"
            rates = {label: found["batches/s"] for label, found in report[regime].items()}
            pictures.append(bars(f"Batches per second, {report['dtype']}: {name.lower()}", rates, ours=["kdcache"]))
        return text, pictures

    return section


SECTIONS: Mapping[str, Callable[[Report], Section]] = {
    "steps": steps,
    "loader-float16": loader("The loader and what one would take instead, float16"),
    "loader-int8": loader("The loader and what one would take instead, int8"),
    "dump": dump,
    "cofinetune": cofinetune,
    "freed": freed,
    "scale": scale,
}
