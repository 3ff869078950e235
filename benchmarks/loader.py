"""Measures the loader on a synthetic cache: start-up, first batch, rows per second and bytes.

    python benchmarks/loader.py                              # 3 teachers x 4 layers x 128, int8, 8 parts of 4,096 texts
    python benchmarks/loader.py --dim 768 --dtype float16    # the largest usual hidden states

Values are random numbers. Texts are made-up reviews, tokenised by three real types of tokenizers; the student shares
the first one. The cache is written to a temporary directory and read from the page cache, so the CPU is measured.
Results are in docs/decisions/0005-loader.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

DEPTH = 12


def main() -> None:
    """Write the cache, read two epochs of it, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--part-size", type=int, default=4096)
    parser.add_argument("--words", type=int, default=20, help="mean length of a text")
    parser.add_argument("--teachers", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="int8", choices=("int8", "float16", "float32"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--memory-gb", type=float, default=2.0, help="bound on decoded parts kept between epochs")
    parser.add_argument(
        "--profile", action="store_true", help="profile the second epoch's batches, made without threads"
    )
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # alignment is the trainer's work; its threads would compete with those of the loader
    with tempfile.TemporaryDirectory() as directory:
        os.environ["KDCACHE_HOME"] = str(Path(directory) / "home")
        tokenizers = _tokenizers(options.teachers)
        cache_dir = Path(directory) / "cache"
        with _timed() as written:
            _write_cache(cache_dir, tokenizers, options)
        print(f"cache written in {written[0]:.0f} s", file=sys.stderr)
        json.dump(_measure(cache_dir, tokenizers, options), sys.stdout, indent=2)
        print()


def _tokenizers(teachers: int) -> list[Any]:
    from kdcache.testing import tiny

    return [tiny.wordpiece_tokenizer(), tiny.bytelevel_tokenizer(), tiny.sentencepiece_tokenizer()][:teachers]


def _texts(count: int, words: int) -> list[tuple[str, ...]]:
    from kdcache.testing.tiny import WORDS

    rng = random.Random(0)
    return [
        (" ".join(rng.choices(WORDS, k=max(1, round(rng.gauss(words, words / 3))))) + f" {index}",)
        for index in range(count)
    ]


def _write_cache(path: Path, tokenizers: list[Any], options: argparse.Namespace) -> None:
    from kdcache.cache.ids import id_array, text_id
    from kdcache.cache.spec import Fingerprints, Settings, TargetSpec, TaskSpec, TeacherSpec
    from kdcache.cache.tokens import Outputs
    from kdcache.cache.writer import open_writer
    from kdcache.codecs.base import Basis, HiddenBlock, LayerSpec
    from kdcache.data.encoding import TRUNCATION, encode, tokenizer_fingerprint, tokenizer_json
    from kdcache.loading.alignment import student_tokens

    texts = _texts(options.parts * options.part_size, options.words)
    layers = {
        DEPTH * j // options.layers: LayerSpec("pca", options.dim, options.dtype) for j in range(1, options.layers + 1)
    }
    rng = np.random.default_rng(0)
    basis = Basis(
        np.eye(options.dim, 1024, dtype=np.float32),
        np.zeros(1024, np.float32),
        np.ones(options.dim, np.float32),
        1.0,
        1.0,
    )
    with open_writer(path, TaskSpec(("sentence",), ("0", "1")), Settings(0, options.part_size)) as writer:
        writer.add_texts({text_id(text): text for text in texts}, {})
        for number, tokenizer in enumerate(tokenizers):
            prints = Fingerprints(*("0" * 64,) * 3, tokenizer_fingerprint(tokenizer))
            spec = TeacherSpec(
                f"teacher{number}", "shared", prints, DEPTH, 1024, 128, TRUNCATION, "torch", "float32",
                TargetSpec(shape=(2,)), None, 16, layers,
            )  # fmt: skip
            tasks = writer.declare_teacher(spec, tokenizer_json(tokenizer))
            writer.write_bases(spec.name, dict.fromkeys(layers, basis))
            for task in tasks:
                encoded = encode(tokenizer, writer.texts_of(task.part), 128)
                hidden = {layer: _block(rng, int(encoded.offsets[-1]), options, HiddenBlock) for layer in layers}
                outputs = Outputs(rng.standard_normal((len(encoded), 2), dtype=np.float32))
                writer.write_part(spec.name, task.part, outputs=outputs, tokens=student_tokens(encoded), hidden=hidden)
        writer.write_examples(
            "train", id_array([text_id(text) for text in texts]), np.zeros(len(texts), np.int64), None
        )
        writer.publish({})


def _block(rng: np.random.Generator, tokens: int, options: argparse.Namespace, block: Any) -> Any:
    if options.dtype == "int8":
        return block(rng.integers(-127, 128, (tokens, options.dim), np.int8), rng.random(tokens, np.float32) + 0.01)
    return block(rng.standard_normal((tokens, options.dim), dtype=np.float32).astype(options.dtype))


def _measure(path: Path, tokenizers: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    from kdcache.cache.reader import open_cache
    from kdcache.loading.cached import loader

    with _timed() as opening:
        memory = round(options.memory_gb * 2**30)
        source = loader(
            open_cache(path), tokenizers[0], student_layers=options.layers, batch_size=options.batch_size,
            window=options.window, memory_bytes=memory,
        )  # fmt: skip
    report: dict[str, Any] = {
        "options": vars(options),
        "cpus": os.cpu_count(),
        "numpy": np.__version__,
        "open_s": opening[0],
    }
    report["first epoch, nothing kept"] = _epoch(source, 0)
    report["second epoch, parts kept"] = _epoch(source, 1)
    again = loader(
        open_cache(path),
        tokenizers[0],
        student_layers=options.layers,
        batch_size=options.batch_size,
        window=options.window,
    )
    report["another run, student tokens and alignments kept on disk"] = _epoch(again, 0)
    if options.profile:
        _profile(source)
    report["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return report


def _epoch(source: Any, epoch: int) -> dict[str, float]:
    start, cpu = time.perf_counter(), time.process_time()
    first, rows, values, aligned = 0.0, 0, 0, 0.0
    for batch in source.batches(epoch):
        first = first or time.perf_counter() - start
        rows += len(batch)
        values += sum(hidden.values.nbytes for hidden in batch.targets.hidden.values())
        begin = time.perf_counter()
        for hidden in batch.targets.hidden.values():
            hidden.aligned()
        aligned += time.perf_counter() - begin
    wall = time.perf_counter() - start
    steps = source.steps_per_epoch
    numbers = {
        "first_batch_s": first, "wall_s": wall, "cpu_s": time.process_time() - cpu, "rows_per_s": rows / wall,
        "values_mb_per_s": values / wall / 1e6, "ms_per_batch": 1000 * wall / steps,
        "of_it_aligning_ms": 1000 * aligned / steps,
    }  # fmt: skip
    return {name: round(number, 3) for name, number in numbers.items()}


def _profile(source: Any) -> None:
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.enable()
    for _ in source._walk(1, 0):
        pass
    profile.disable()
    pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)


@contextmanager
def _timed() -> Iterator[list[float]]:
    taken: list[float] = []
    start = time.perf_counter()
    yield taken
    taken.append(time.perf_counter() - start)


if __name__ == "__main__":
    main()
