"""Measures what grows with the number of rows: opening, first batch, resident memory, bytes of the manifest.

    python benchmarks/scale.py --rows 10000 100000 1000000
    python benchmarks/scale.py --rows 10000 100000 1000000 10000000 --directory DIRECTORY

    python benchmarks/scale.py --rows --data 1000000 10000000

Making the largest takes some minutes. Decades
after ten million rows are computed from what was measured (growth.py).

The caches are synthetic: three teachers, three layers of 8 int8 values per token each, texts of 12 tokens. Only
the number of texts, parts and files matters. Texts differ; parts have the same teacher outputs, as hard links, so ten
million rows take 2 GB of the disk and not 18. A separate process opens each cache and reads batches until well after
the window is full. Only the window stays decoded, so memory consists of the window and of what grows with the rows.
`resident` is the median over the batches after the window is full. The first process joins the ids and encodes texts,
and keeps both; values without `first process` are those of the processes after it. Prints JSON.

With `--data`, data files of so many rows are read as `dump-teachers` and `distill` do: with objects for all texts (up
to two million rows), into mapped arrays, and again by a process that finds them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import growth
import numpy as np
from measure import forget_peak, in_a_process, machine, own_mb, peak_memory_mb, resident_mb

from kdcache.cache.spec import LARGEST_PART_SIZE

if TYPE_CHECKING:
    from kdcache.cache.spec import TeacherSpec
    from kdcache.cache.writer import CacheWriter
    from kdcache.files import FileDigest
    from kdcache.loading.cached import CachedBatches
    from kdcache.loading.targets import Batch

TEACHERS, LAYERS, DIM, WINDOW = 3, 3, 8, 2
TOKENS = 12  # of a text
WORDS = ("film", "plot", "good", "fine", "warm", "dull", "weak", "cold")  # one token each
MAX_LENGTH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--steps", type=int, default=1200, help="batches of 32 that are taken, over as many epochs as it needs"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="keep the caches there, and use those that are there")
    parser.add_argument("--part-size", type=int, help="texts of a part; that of a dump of so many texts by default")
    parser.add_argument(
        "--data", type=int, nargs="*", default=[], help="rows of data files that are read, as dump-teachers does"
    )
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--read-data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--in-memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read_data:
        json.dump(read_data(arguments.read_data, in_memory=arguments.in_memory), sys.stdout)
        return
    if arguments.read:
        json.dump(read(arguments.read, arguments.steps), sys.stdout)
        return
    report: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KDCACHE_HOME"] = str(Path(folder) / "home")
        for rows in arguments.rows:
            print(f"{rows:,} rows", file=sys.stderr, flush=True)
            cache = (arguments.directory or Path(folder)) / str(rows)
            if not (cache / "manifest.json").exists():
                write(cache, rows, arguments.part_size)
            report[f"{rows} rows"] = measured(cache, arguments.steps, arguments.repeats)
        for rows in arguments.data:
            print(f"{rows:,} rows of data", file=sys.stderr, flush=True)
            report[f"data file, {rows}"] = measured_data(Path(folder) / f"{rows}.tsv", rows)
    for few, many in itertools.pairwise(f"{rows} rows" for rows in arguments.rows):
        report[many]["resident / that of fewer rows"] = report[many]["resident, MB"] / report[few]["resident, MB"]
    if arguments.rows and report[f"{max(arguments.rows)} rows"]["part size"] == LARGEST_PART_SIZE:
        report |= growth.computed({rows: report[f"{rows} rows"] for rows in arguments.rows})
    json.dump(report, sys.stdout, indent=2)
    print()


FIRST = ("open, s", "open, s of the processor", "first batch, s", "peak while opening, MB")  # joins and tokenizes


def measured(cache: Path, steps: int, repeats: int) -> dict[str, Any]:
    """Read a cache in ``repeats`` processes, one after the other; the first one finds nothing kept by others."""
    turns = [in_a_process("scale.py", ["--read", str(cache), "--steps", str(steps)]) for _ in range(repeats)]
    later = turns[1:] or turns
    files = [file for file in cache.rglob("*") if file.is_file()]
    return {
        "files": len(files),
        "data bytes": sum(file.stat().st_size for file in files),
        "manifest bytes": (cache / "manifest.json").stat().st_size,
        **{key: statistics.median(turn[key] for turn in later) for key in turns[0]},
        **{f"first process: {key}": turns[0][key] for key in FIRST},
    }


IN_MEMORY = 2_000_000  # rows; more would need gigabytes


def measured_data(path: Path, rows: int) -> dict[str, Any]:
    """Read a data file of ``rows`` in a process of its own: with all texts as objects, mapped, and mapped again."""
    half = [" ".join(words) for words in itertools.product(WORDS, repeat=5)]
    with path.open("w", encoding="utf-8") as file:
        file.write("sentence\tlabel\n")
        for row in np.random.default_rng(0).permutation(rows).tolist():
            file.write(f"{half[row >> 15]} {half[row & 32767]}\t{row % 2}\n")
    found: dict[str, Any] = {"bytes of the file": path.stat().st_size}
    turns = {"objects": ["--in-memory"]} if rows <= IN_MEMORY else {}
    for name, flags in {**turns, "mapped, first": [], "mapped, later": []}.items():
        one = in_a_process("scale.py", ["--read-data", str(path), *flags])
        found |= {f"{name}: {key}": value for key, value in one.items()}
    path.unlink()
    return found


def read_data(path: Path, *, in_memory: bool) -> dict[str, float]:
    """The data of a recipe, and what of it stays in memory; a file of any size is read as a large one."""
    from kdcache.data import task as of_recipe
    from kdcache.data.task import load_task
    from kdcache.recipe import DataSection

    of_recipe.LARGE = sys.maxsize if in_memory else 0
    section = DataSection(train=str(path), text=["sentence"], label="label")
    before, own = resident_mb(), own_mb()
    forget_peak()
    began, began_cpu = time.perf_counter(), time.process_time()
    task = load_task(section)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    peak = peak_memory_mb()
    assert task.texts[next(iter(task.texts))]
    return {
        "s": seconds,
        "s of the processor": cpu,
        "peak, MB": peak - before,
        "stays without mapped files, MB": own_mb() - own,
        "bytes of a row that stay": 1e6 * (own_mb() - own) / len(task.texts),
    }


def write(path: Path, rows: int, part_size: int | None) -> None:
    """A valid cache of ``rows`` short texts. A directory in which this was interrupted is completed."""
    from kdcache.cache.spec import Settings, TaskSpec, chosen_part_size
    from kdcache.cache.writer import open_writer
    from kdcache.data.encoding import tokenizer_json
    from kdcache.files import use_disk
    from kdcache.testing import tiny
    from kdcache.testing.faults import UnsyncedDisk

    rng = np.random.default_rng(0)
    tokenizer, specs = tiny.wordpiece_tokenizer(), teachers()
    settings = Settings(0, part_size or chosen_part_size(rows))
    with use_disk(UnsyncedDisk()), open_writer(path, TaskSpec(("sentence",), ("0", "1")), settings) as writer:
        add_texts(writer, rng.permutation(rows))
        for spec in specs:
            writer.declare_teacher(spec, tokenizer_json(tokenizer))
        write_targets(writer, specs, rng)
        ids = np.concatenate([part.text_ids for part in writer.parts])
        writer.write_examples("train", ids[rng.permutation(rows)], rng.integers(0, 2, rows), None)
        writer.publish({})


def add_texts(writer: CacheWriter, order: np.ndarray) -> None:
    """Texts in this order: the number of a row in ten words for its digits to the base 8, so each has twelve tokens.

    ``CacheWriter.add_texts`` takes all texts at once, and ten million of them would need 8 GB.
    """
    from kdcache.cache import layout, tables
    from kdcache.cache.contents import PartInfo
    from kdcache.cache.ids import id_array, text_id
    from kdcache.cache.writer import Part
    from kdcache.files import write_file

    half = [" ".join(words) for words in itertools.product(WORDS, repeat=5)]
    contents, size = writer.contents, writer.contents.settings.part_size
    for start in range(size * len(contents.parts), len(order), size):
        texts = [(f"{half[row >> 15]} {half[row & 32767]}",) for row in order[start : start + size].tolist()]
        ids = id_array(map(text_id, texts))
        part = PartInfo(layout.part_name(len(contents.parts)), "full", len(texts))
        files = {
            layout.ids_file(part.name): tables.encode_ids(ids),
            layout.text_file(part.name): tables.encode_text(contents.task.text_columns, texts),
        }
        written = {path: write_file(writer.root / path, data) for path, data in files.items()}
        writer.journal.add_part(part, written)
        contents.files.update(written)
        contents.parts.append(part)
        writer.give_ids(Part(part.name, part.scope, ids))


def teachers() -> list[TeacherSpec]:
    """The specification of the synthetic teachers; their tokens are those of the student."""
    from kdcache.cache.spec import Fingerprints, TargetSpec, TeacherSpec
    from kdcache.codecs.base import LayerSpec
    from kdcache.data.encoding import TRUNCATION, tokenizer_fingerprint
    from kdcache.testing import tiny

    prints = Fingerprints(*("0" * 64,) * 3, tokenizer_fingerprint(tiny.wordpiece_tokenizer()))
    layers = {layer: LayerSpec("none", DIM, "int8") for layer in range(1, LAYERS + 1)}
    return [
        TeacherSpec(
            f"teacher-{index}", "shared", prints, LAYERS, DIM, MAX_LENGTH, TRUNCATION, "torch", "float32",
            TargetSpec(shape=(2,)),
            None, 16, layers,
        )
        for index in range(TEACHERS)
    ]  # fmt: skip


def write_targets(writer: CacheWriter, specs: list[TeacherSpec], rng: np.random.Generator) -> None:
    """Write random outputs and hidden states of every teacher; parts of the same length share them by hard links."""
    from kdcache.cache.tokens import Outputs
    from kdcache.codecs.base import Basis, HiddenBlock
    from kdcache.data.encoding import encode
    from kdcache.testing import tiny

    for spec in specs:
        writer.write_bases(spec.name, {layer: Basis(None, None, None, 1.0, 1.0) for layer in spec.layers})
        written: dict[int, tuple[str, dict[str, FileDigest]]] = {}  # by length: a part, and its files
        for part in [task.part for task in writer.missing(spec.name)]:
            length = len(part.text_ids)
            if length in written:
                link_part(writer, spec.name, part.name, *written[length], tokens=length * TOKENS)
                continue
            tokens = encode(tiny.wordpiece_tokenizer(), writer.texts_of(part), MAX_LENGTH).tokens
            count = int(tokens.offsets[-1])
            assert count == length * TOKENS
            blocks = {
                layer: HiddenBlock(rng.integers(-127, 128, (count, DIM), np.int8), rng.random(count, np.float32) + 0.01)
                for layer in spec.layers
            }
            outputs = Outputs(rng.standard_normal((length, 2), dtype=np.float32))
            writer.write_part(spec.name, part, outputs=outputs, tokens=tokens, hidden=blocks)
            own = f"teachers/{spec.name}/"
            files = {
                path: digest
                for path, digest in writer.contents.files.items()
                if path.startswith(own) and f"/{part.name}." in path
            }
            written[length] = part.name, files


def link_part(
    writer: CacheWriter, teacher: str, part: str, other: str, files: Mapping[str, FileDigest], *, tokens: int
) -> None:
    """Commit a part of a teacher whose files are those of another part."""
    names = {path: path.replace(f"/{other}.", f"/{part}.") for path in files}
    for path, name in names.items():
        (writer.root / name).parent.mkdir(parents=True, exist_ok=True)
        (writer.root / name).unlink(missing_ok=True)  # of a run that was interrupted
        os.link(writer.root / path, writer.root / name)
    linked = {name: files[path] for path, name in names.items()}
    writer.journal.add_teacher_part(teacher, part, tokens, linked)
    writer.contents.files.update(linked)
    writer.contents.tokens.setdefault(teacher, {})[part] = tokens


def read(path: Path, steps: int) -> dict[str, float]:
    """Open, first batch, and memory once the window is full, over ``steps`` batches."""
    import torch

    from kdcache.loading.cached import loader
    from kdcache.testing import tiny

    torch.set_num_threads(1)
    tokenizer = tiny.wordpiece_tokenizer()
    before, own = resident_mb(), own_mb()
    forget_peak()
    began, began_cpu = time.perf_counter(), time.process_time()
    source = loader(path, tokenizer, student_layers=LAYERS, max_length=MAX_LENGTH, memory_bytes=0, window=WINDOW)
    opened, opened_cpu = time.perf_counter(), time.process_time()
    opening = peak_memory_mb()
    forget_peak()
    began_first, began_first_cpu = time.perf_counter(), time.process_time()
    batches = endless(source)
    next(batches)
    first, first_cpu = time.perf_counter(), time.process_time()
    peak = peak_memory_mb()
    resident = [resident_mb() for _ in itertools.islice(batches, steps)]
    owned = own_mb()
    batches.close()  # ends its threads
    return {
        "open, s": opened - began,
        "open, s of the processor": opened_cpu - began_cpu,
        "first batch, s": first - began_first,
        "first batch, s of the processor": first_cpu - began_first_cpu,
        "order of an epoch, s of the processor": ordered(source),
        "part size": source.cache.settings.part_size,
        "before opening, MB": before,
        "resident, MB": statistics.median(resident[WINDOW * source.cache.settings.part_size // 32 :] or resident),
        "without mapped files, more than before, MB": owned - own,
        "peak while opening, MB": opening,
        "peak of the first batch, MB": peak,
    }


def ordered(source: CachedBatches) -> float:
    """Seconds of the processor for what an epoch computes of all its rows before its first batch."""
    from kdcache.loading.prefetch import PartLifetimes

    began = time.process_time()
    rows, steps = source.epochs.shares(source.epochs.order(1), 0)
    PartLifetimes.of(source.epochs.parts_of(rows), steps)
    return time.process_time() - began


def endless(source: CachedBatches) -> Generator[Batch]:
    for epoch in itertools.count():
        yield from source.batches(epoch)


if __name__ == "__main__":
    main()
