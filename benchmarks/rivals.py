"""Compares the loader with alternatives: the same ragged rows, batches of 32, a warm page cache.

    python benchmarks/rivals.py --rows 16384 --dim 256 --dtype float16

Contenders:

    kdcache        all inputs of a student's step: tokens, labels, logits, hidden states with their alignment; batches
                   are made in a thread, as in `kdcache distill`, and in the caller's thread, as in the next two.
                   The texts are tokenised already (kept on disk by an earlier run), or, in the window only, by
                   this epoch, which the others need not do
    memory map     one flat NumPy file, rows in random order: the limit
    safetensors    one file per part; parts are kept, or read through the same window
    datasets       Hugging Face, Arrow, map-style, shuffled
    streaming      mosaicml-streaming, with its own shuffle and the defaults of its documentation
    litdata        the same

The last three run with 0 and 2 workers of torch's DataLoader. Each turn of a contender has its own process, and turns
are interleaved. `memory`: from the second epoch on, with everything decoded if a contender can keep it; kdcache and
safetensors also shuffle uniformly. `window`: the first epoch through 1/8 of the data, with digests checked if there are
any; the clock begins before the data are opened, with modules imported and the student's tokenizer at hand. Shuffle
quality is the rank correlation between stored and served order (0 is best), and the number of distinct
parts of 1/32 of the data in a batch. In all contenders the C library keeps freed memory, as in `kdcache distill`.

The last three libraries need older versions of kdcache's dependencies. `--rivals-python` names the interpreter of an
environment that has them (benchmarks/requirements.txt). Libraries that are not installed are left out. Prints JSON.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import in_a_process, machine, ratio, resident_mb, summary

PARTS, BATCH = 32, 32
NEEDS = {"datasets": "datasets", "streaming": "streaming", "litdata": "litdata"}
HERE = "kdcache, caller's thread"
FIRST = "kdcache, first run"  # no student tokens are kept yet
OURS = ("kdcache", HERE, FIRST)
CONTENDERS = (*OURS, "memory map", "safetensors", "datasets", "streaming", "litdata")
IMPORTS = {  # memory of a program before it opens its data
    **dict.fromkeys(
        OURS,
        ("kdcache.loading.cached", "kdcache.cache.reader", "kdcache.testing.tiny", "transformers", "zarr"),
    ),
    "memory map": (),
    "safetensors": ("safetensors.numpy", "kdcache.loading.order"),
    "datasets": ("datasets",),
    "streaming": ("streaming",),
    "litdata": ("litdata",),
}
KEEP_FREED = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 30))
WITH_WORKERS = ("datasets", "streaming", "litdata")

Batches = Iterator[
    tuple[np.ndarray, np.ndarray]
]  # (row numbers, or ids of kdcache, packed values [tokens, dim]), one epoch


def main() -> None:
    arguments = parse()
    if arguments.alone:
        if arguments.regime == "write":
            WRITERS[arguments.alone](arguments.folder, *make_rows(arguments))
        json.dump({} if arguments.regime == "write" else turn(arguments), sys.stdout)
        return
    report: dict[str, Any] = {
        "machine": machine(),
        "rows": arguments.rows,
        "dim": arguments.dim,
        "dtype": arguments.dtype,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        os.environ |= {"KDCACHE_HOME": str(Path(folder) / "home"), **KEEP_FREED}
        contenders = [name for name in CONTENDERS if there(name, arguments.rivals_python)]
        for name in filter(WRITERS.__contains__, contenders):
            print(f"writing {name}", file=sys.stderr, flush=True)
            alone(arguments, name, "write")
        for regime in ("memory", "window"):
            taking_part = [name for name in contenders if regime == "window" or name != FIRST]
            report[regime] = compare(arguments, taking_part, regime)
    json.dump(report, sys.stdout, indent=2)
    print()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--dtype", choices=("float16", "int8"), default="float16")
    parser.add_argument("--tokens", type=int, default=24, help="mean tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--seconds", type=float, default=0.5, help="least time that a rate in memory is measured for")
    parser.add_argument("--alone", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--rivals-python", default=sys.executable, help="interpreter that has the other libraries")
    parser.add_argument("--regime", choices=("memory", "window", "write"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(arguments: argparse.Namespace, contenders: list[str], regime: str) -> dict[str, Any]:
    """Every contender with each of its numbers of workers, in rotating order."""
    entries = [
        (name, workers) for name in contenders for workers in (arguments.workers if name in WITH_WORKERS else [0])
    ]
    turns: dict[str, list[dict[str, Any]]] = {label(*entry): [] for entry in entries}
    for number in range(arguments.rounds):
        for name, workers in entries[number % len(entries) :] + entries[: number % len(entries)]:
            turns[label(name, workers)].append(alone(arguments, name, regime, workers))
    limit = [one["GB/s"] for one in turns[label("memory map", 0)]]
    return {
        name: {key: summary([one[key] for one in found]) for key in found[0]}
        | {"share of the memory map's GB/s": ratio([one["GB/s"] for one in found], limit)}
        for name, found in turns.items()
    }


def there(name: str, python: str) -> bool:
    """Whether the interpreter of a contender can import its library."""
    return (
        name not in NEEDS or not subprocess.run([python, "-c", f"import {NEEDS[name]}"], capture_output=True).returncode
    )


def alone(arguments: argparse.Namespace, name: str, regime: str, workers: int = 0) -> dict[str, Any]:
    """Run one contender in its own process."""
    options = ["--rows", str(arguments.rows), "--dim", str(arguments.dim), "--dtype", arguments.dtype]
    options += ["--seconds", str(arguments.seconds), "--tokens", str(arguments.tokens)]
    options += ["--alone", name, "--regime", regime, "--workers", str(workers)]
    python = arguments.rivals_python if name in NEEDS else sys.executable
    return in_a_process("rivals.py", [*options, "--folder", str(arguments.folder)], python=python)


def label(name: str, workers: int) -> str:
    return f"{name}, {workers} workers" if name in WITH_WORKERS else name


def turn(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one contender: one epoch, and further ones if it was too short. Quality is that of the last epoch."""
    import torch

    torch.set_num_threads(1)
    for module in IMPORTS[arguments.alone]:
        importlib.import_module(module)
    arguments.tokenizer = student_tokenizer() if arguments.alone in OURS else None
    resident = before = resident_mb()
    began = time.perf_counter()
    epochs = READERS[arguments.alone](arguments.folder, arguments)
    if arguments.regime == "memory":
        for _ in epochs():  # so that a contender can keep decoded data
            pass
        began = time.perf_counter()
    first, count, size, taken = 0.0, 0, 0, 0.0
    while not taken or (arguments.regime == "memory" and taken < arguments.seconds):
        served = []
        for rows, values in epochs():
            first = first or time.perf_counter() - began
            count += 1
            size += (
                len(values) * arguments.dim * np.dtype(arguments.dtype).itemsize
            )  # as stored: some contenders return wider numbers
            if count % 16 == 0:
                resident = max(resident, resident_mb())
            served.append(rows)
        taken = time.perf_counter() - began
    if arguments.alone in OURS:
        served = row_numbers(arguments.folder, served)
    order = np.concatenate(served)
    assert len(np.unique(order)) == len(order) >= 0.99 * arguments.rows, (
        f"{len(np.unique(order))} of {arguments.rows} rows"
    )
    return {
        "batches/s": count / taken,
        "GB/s": size / taken / 1e9,
        "first batch, s": first,
        "resident memory beyond the start, MB": max(resident, resident_mb()) - before,
        "rank correlation": abs(float(np.corrcoef(np.arange(len(order)), order)[0, 1])),
        "parts per batch": float(np.mean([len(np.unique(rows * PARTS // arguments.rows)) for rows in served])),
    }


def make_rows(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Packed values and offsets of ragged rows; the values do not matter."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(arguments.tokens, arguments.tokens / 3, arguments.rows).round(), 9, 120).astype(
        np.int64
    )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    shape = (int(offsets[-1]), arguments.dim)
    if arguments.dtype == "int8":
        return rng.integers(-127, 128, shape, np.int8), offsets
    return rng.standard_normal(shape, np.float32).astype(np.float16), offsets


def part_bounds(rows: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, rows, PARTS + 1).round().astype(int).tolist()
    return list(itertools.pairwise(edges))


# kdcache: texts of single-character words, so that its rows have as many tokens as the others


def write_kdcache(folder: Path, values: np.ndarray, offsets: np.ndarray) -> None:
    from kdcache.cache.ids import id_array, id_list, text_id
    from kdcache.cache.spec import Fingerprints, Settings, TargetSpec, TaskSpec, TeacherSpec
    from kdcache.cache.tokens import Outputs
    from kdcache.cache.writer import open_writer
    from kdcache.codecs.base import Basis, HiddenBlock, LayerSpec
    from kdcache.data.encoding import TRUNCATION, encode, tokenizer_fingerprint, tokenizer_json
    from kdcache.files import use_disk
    from kdcache.loading.alignment import student_tokens
    from kdcache.testing import tiny
    from kdcache.testing.faults import UnsyncedDisk

    tokenizer, rows, rng = tiny.wordpiece_tokenizer(), len(offsets) - 1, np.random.default_rng(1)
    texts = [digits(row, int(length)) for row, length in enumerate(np.diff(offsets))]
    numbers = {text_id(text): row for row, text in enumerate(texts)}
    dtype: Any = values.dtype.name
    prints = Fingerprints(*("0" * 64,) * 3, tokenizer_fingerprint(tokenizer))
    spec = TeacherSpec(
        "teacher", "shared", prints, 1, values.shape[1], 128, TRUNCATION, "torch", "float32",
        TargetSpec(shape=(2,)), None, 16,
        {1: LayerSpec("none", values.shape[1], dtype)},
    )  # fmt: skip
    part_size = -(-rows // PARTS)
    with (
        use_disk(UnsyncedDisk()),
        open_writer(folder / "kdcache", TaskSpec(("t",), ("0", "1")), Settings(0, part_size)) as writer,
    ):
        writer.add_texts(dict(zip(numbers, texts, strict=True)), {})
        tasks = writer.declare_teacher(spec, tokenizer_json(tokenizer))
        writer.write_bases(spec.name, {1: Basis(None, None, None, 1.0, 1.0)})
        order: list[int] = []
        for task in tasks:
            order += [numbers[one] for one in id_list(task.part.text_ids)]
            encoded = encode(tokenizer, writer.texts_of(task.part), 128)
            count = int(encoded.offsets[-1])
            taken = values[rng.integers(0, len(values), count)]
            block = HiddenBlock(taken, rng.random(count, np.float32) if dtype == "int8" else None)
            outputs = Outputs(rng.standard_normal((len(encoded), 2), dtype=np.float32))
            writer.write_part(spec.name, task.part, outputs=outputs, tokens=student_tokens(encoded), hidden={1: block})
        writer.write_examples("train", id_array([text_id(texts[row]) for row in order]), np.zeros(rows, np.int64), None)
        writer.publish({})


def digits(row: int, length: int) -> tuple[str, ...]:
    """A unique text of ``length`` tokens, including [CLS] and [SEP]."""
    return (" ".join("abcdefghij"[int(digit)] for digit in f"{row:0{max(1, length - 2)}d}"),)


def student_tokenizer() -> Any:
    from kdcache.testing import tiny

    return tiny.wordpiece_tokenizer()


def read_kdcache(folder: Path, arguments: argparse.Namespace) -> Callable[[], Batches]:
    from kdcache.loading.cached import loader

    whole = arguments.regime == "memory"
    if arguments.alone == FIRST:
        os.environ["KDCACHE_HOME"] = tempfile.mkdtemp(dir=folder)
    source = loader(
        folder / "kdcache", arguments.tokenizer, batch_size=BATCH, student_layers=1, max_length=128,
        window="all" if whole else PARTS // 8, memory_bytes=(8 << 30) if whole else 0,
        background=arguments.alone != HERE,
    )  # fmt: skip
    epoch = itertools.count()

    def batches() -> Batches:
        for batch in source.batches(next(epoch)):
            assert batch.targets is not None
            (hidden,) = batch.targets.hidden.values()
            yield batch.text_ids, hidden.values.numpy()

    return batches


def row_numbers(folder: Path, served: list[np.ndarray]) -> list[np.ndarray]:
    """Positions in stored order of served ids; computed after the measurement."""
    from kdcache.cache.reader import open_cache

    numbers = {
        row.tobytes(): number for number, row in enumerate(open_cache(folder / "kdcache").examples("train").text_ids)
    }
    return [np.array([numbers[row.tobytes()] for row in ids]) for ids in served]


# A flat file under a memory map


def write_flat(folder: Path, values: np.ndarray, offsets: np.ndarray) -> None:
    np.save(folder / "flat.npy", values)
    np.save(folder / "offsets.npy", offsets)


def read_flat(folder: Path, arguments: argparse.Namespace) -> Callable[[], Batches]:
    values, offsets = np.load(folder / "flat.npy", mmap_mode="r"), np.load(folder / "offsets.npy")
    seed = itertools.count()

    def batches() -> Batches:
        order = np.random.default_rng(next(seed)).permutation(arguments.rows)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            yield rows, np.concatenate([values[offsets[row] : offsets[row + 1]] for row in rows])

    return batches


# One safetensors file per part, in the loader's own order


def write_safetensors(folder: Path, values: np.ndarray, offsets: np.ndarray) -> None:
    from safetensors.numpy import save_file

    (folder / "safetensors").mkdir()
    for number, (start, end) in enumerate(part_bounds(len(offsets) - 1)):
        inside = {"values": values[offsets[start] : offsets[end]], "offsets": offsets[start : end + 1] - offsets[start]}
        save_file(
            {name: np.ascontiguousarray(one) for name, one in inside.items()},
            folder / "safetensors" / f"{number}.safetensors",
        )


def read_safetensors(folder: Path, arguments: argparse.Namespace) -> Callable[[], Batches]:
    from safetensors.numpy import load_file

    from kdcache.loading.order import epoch_order

    bounds, whole = part_bounds(arguments.rows), arguments.regime == "memory"
    part_of = np.repeat(np.arange(PARTS), [end - start for start, end in bounds])
    within = np.arange(arguments.rows) - np.array([start for start, _ in bounds])[part_of]
    kept: dict[int, dict[str, np.ndarray]] = {}
    epoch = itertools.count()

    def batches() -> Batches:
        order = epoch_order(part_of, seed=0, epoch=next(epoch), window="all" if whole else PARTS // 8)
        last = np.zeros(PARTS, np.int64)
        last[part_of[order]] = np.arange(len(order))
        for start in range(0, len(order), BATCH):
            rows, pieces = order[start : start + BATCH], []
            for row in rows:
                part = int(part_of[row])
                if part not in kept:
                    kept[part] = load_file(folder / "safetensors" / f"{part}.safetensors")
                offsets = kept[part]["offsets"]
                pieces.append(kept[part]["values"][offsets[within[row]] : offsets[within[row] + 1]])
            yield rows, np.concatenate(pieces)
            if not whole:
                for part in [part for part in kept if last[part] < start + BATCH]:
                    del kept[part]

    return batches


# Hugging Face datasets


def write_datasets(folder: Path, values: np.ndarray, offsets: np.ndarray) -> None:
    import datasets
    import pyarrow as pa

    rows = len(offsets) - 1
    flat = pa.array(values.reshape(-1))
    hidden = pa.LargeListArray.from_arrays(offsets * values.shape[1], flat)
    table = pa.table({"row": np.arange(rows), "hidden": hidden})
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(str(folder / "datasets"))


def read_datasets(folder: Path, arguments: argparse.Namespace) -> Callable[[], Batches]:
    import datasets
    from torch.utils.data import DataLoader

    data = datasets.load_from_disk(str(folder / "datasets")).with_format("numpy")

    def together(examples: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        flat = np.concatenate([one["hidden"] for one in examples])
        return np.array([one["row"] for one in examples]), flat.reshape(-1, arguments.dim)

    loader = DataLoader(data, BATCH, shuffle=True, num_workers=arguments.workers[0], collate_fn=together)
    return lambda: iter(loader)


# mosaicml-streaming


def write_streaming(folder: Path, values: np.ndarray, offsets: np.ndarray) -> None:
    from streaming import MDSWriter

    columns = {"row": "int", "hidden": f"ndarray:{values.dtype.name}"}
    with MDSWriter(out=str(folder / "streaming"), columns=columns) as writer:
        for row, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
            writer.write({"row": row, "hidden": values[start:end]})


def read_streaming(folder: Path, arguments: argparse.Namespace) -> Callable[[], Batches]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    data = StreamingDataset(local=str(folder / "streaming"), shuffle=True, batch_size=BATCH)
    loader = DataLoader(data, BATCH, num_workers=arguments.workers[0], collate_fn=joined)
    return lambda: iter(loader)


# litdata


def write_litdata(folder: Path, values: np.ndarray, offsets: np.ndarray) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder / "litdata"), chunk_bytes="64MB")
    for row, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        writer.add_item(row, {"row": row, "hidden": values[start:end]})
    writer.done()
    writer.merge()


def read_litdata(folder: Path, arguments: argparse.Namespace) -> Callable[[], Batches]:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(folder / "litdata"), shuffle=True, drop_last=False)
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=arguments.workers[0], collate_fn=joined)
    return lambda: iter(loader)


def joined(examples: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the two streaming libraries as one batch."""
    return np.array([int(one["row"]) for one in examples]), np.concatenate(
        [np.asarray(one["hidden"]) for one in examples]
    )


WRITERS: dict[str, Callable[[Path, np.ndarray, np.ndarray], None]] = {
    "kdcache": write_kdcache,
    "memory map": write_flat,
    "safetensors": write_safetensors,
    "datasets": write_datasets,
    "streaming": write_streaming,
    "litdata": write_litdata,
}
READERS: dict[str, Callable[[Path, argparse.Namespace], Callable[[], Batches]]] = {
    **dict.fromkeys(OURS, read_kdcache),
    "memory map": read_flat,
    "safetensors": read_safetensors,
    "datasets": read_datasets,
    "streaming": read_streaming,
    "litdata": read_litdata,
}

if __name__ == "__main__":
    main()
