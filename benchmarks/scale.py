"""What grows with the number of rows: opening, first batch, resident memory, bytes of the manifest.

    python benchmarks/scale.py --rows 10000 100000 1000000

Caches of made-up content (one teacher, one layer of 16 int8 values per token, about 12 tokens a text: content does not
matter here). Each is opened by a process of its own, which takes batches until well after the window is full, with the bound on
decoded parts set low, so that memory shows the window and not what happens to be kept. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import in_a_process, machine, peak_memory_mb

DIM, MEMORY_BYTES = 16, 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=1200, help="batches of 32 that are taken")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        json.dump(read(arguments.read, arguments.steps), sys.stdout)
        return
    report: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KDCACHE_HOME"] = str(Path(folder) / "home")
        for rows in arguments.rows:
            print(f"{rows:,} rows", file=sys.stderr, flush=True)
            cache = Path(folder) / str(rows)
            write(cache, rows)
            options = ["--read", str(cache), "--steps", str(arguments.steps)]
            turns = [in_a_process("scale.py", options) for _ in range(arguments.repeats)]
            report[f"{rows} rows"] = {
                "manifest bytes": (cache / "manifest.json").stat().st_size,
                "data bytes": sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()),
                **{key: sorted(turn[key] for turn in turns)[len(turns) // 2] for key in turns[0]},
                "first process: first batch, s": turns[0]["first batch, s"],
            }
    json.dump(report, sys.stdout, indent=2)
    print()


def write(path: Path, rows: int) -> None:
    """A cache of ``rows`` short texts that is valid in every byte."""
    from kdcache.cache.blocks import Basis, HiddenBlock, Outputs
    from kdcache.cache.files import use_disk
    from kdcache.cache.ids import id_array, text_id
    from kdcache.cache.spec import Fingerprints, LayerSpec, Settings, TargetSpec, TaskSpec, TeacherSpec
    from kdcache.cache.writer import open_writer
    from kdcache.data.encoding import TRUNCATION, encode, tokenizer_fingerprint, tokenizer_json
    from kdcache.distill.align_store import student_tokens
    from kdcache.testing import tiny
    from kdcache.testing.faults import UnsyncedDisk

    rng = np.random.default_rng(0)
    tokenizer = tiny.wordpiece_tokenizer()
    words = np.array(tiny.WORDS)
    texts = [(" ".join(line) + f" {index}",) for index, line in enumerate(words[rng.integers(0, len(words), (rows, 8))])]
    ids = [text_id(text) for text in texts]
    prints = Fingerprints(*("0" * 64,) * 3, tokenizer_fingerprint(tokenizer))
    spec = TeacherSpec(
        "teacher", "shared", prints, 1, DIM, 64, TRUNCATION, "torch", "float32", TargetSpec(shape=(2,)), None, 16,
        {1: LayerSpec("none", DIM, "int8")},
    )  # fmt: skip
    with use_disk(UnsyncedDisk()), open_writer(path, TaskSpec(("sentence",), ("0", "1")), Settings(0, 4096)) as writer:
        writer.add_texts(dict(zip(ids, texts, strict=True)), {})
        tasks = writer.declare_teacher(spec, tokenizer_json(tokenizer))
        writer.write_bases(spec.name, {1: Basis(None, None, None, 1.0, 1.0)})
        for task in tasks:
            encoded = encode(tokenizer, writer.texts_of(task.part), 64)
            count = int(encoded.offsets[-1])
            block = HiddenBlock(rng.integers(-127, 128, (count, DIM), np.int8), rng.random(count, np.float32) + 0.01)
            outputs = Outputs(rng.standard_normal((len(encoded), 2), dtype=np.float32))
            writer.write_part(spec.name, task.part, outputs=outputs, tokens=student_tokens(encoded), hidden={1: block})
        writer.write_examples("train", id_array(ids), rng.integers(0, 2, rows), None)
        writer.publish({})


def read(path: Path, steps: int) -> dict[str, float]:
    """Open, first batch, and memory before and after ``steps`` batches."""
    import torch

    from kdcache.distill.loader import loader
    from kdcache.testing import tiny

    torch.set_num_threads(1)
    tokenizer = tiny.wordpiece_tokenizer()
    before = peak_memory_mb()
    began = time.perf_counter()
    source = loader(path, tokenizer, student_layers=1, max_length=64, memory_bytes=MEMORY_BYTES, window=2)
    opened = time.perf_counter()
    batches = source.batches(0)
    next(batches)
    first = time.perf_counter()
    for _, _batch in zip(range(steps), batches, strict=False):
        pass
    del batches  # ends its threads
    return {
        "open, s": opened - began,
        "first batch, s": first - opened,
        "memory before, MB": before,
        "peak memory, MB": peak_memory_mb(),
    }


if __name__ == "__main__":
    main()
