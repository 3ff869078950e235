"""Measures small choices inside the loader against their alternatives, on one core (docs/decisions/0005-loader.md).

python benchmarks/loader_pieces.py
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.codecs.base import LayerSpec
from kdcache.loading.cached import loader
from kdcache.loading.parts import Interleaved, layers_of
from kdcache.testing import tiny

TOKENS, TEACHER_TOKENS, PARTS = 1100, 1000, 8  # of a batch of 32 texts


def main() -> None:
    """Print one JSON object; times are the best of five rounds."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for dim in (128, 768):
        found[f"align {dim}, us"] = _sums(dim)
    found["32 rows of 32 tokens, 3 layers of 128 int8 with scales, us"] = _layers()
    found["32 rows of 24 tokens x 256 float16, us"] = _rows()
    found["batch of 32 such rows, us of processor time"] = _batches()
    json.dump(found | {"part of 4,096 texts, ms": _part()}, sys.stdout, indent=2)
    print()


def _best(action: Callable[[], Any], rounds: int = 20) -> float:
    action()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(rounds):
            action()
        times.append((time.perf_counter() - start) / rounds)
    return min(times)


def _sums(dim: int) -> dict[str, int]:
    """Weighted sums of teacher tokens: a fused kernel, or gather and index_add."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1, 1, 1, 2, 3]).repeat(TOKENS // 5)
    dst = torch.arange(TOKENS).repeat_interleave(counts)
    src = torch.randint(0, TEACHER_TOKENS, (len(dst),), generator=generator)
    values, weight = torch.randn(TEACHER_TOKENS, dim, generator=generator), torch.rand(len(dst), generator=generator)

    def fused() -> Any:
        first = torch.searchsorted(dst, torch.arange(TOKENS))
        return torch.nn.functional.embedding_bag(src, values, first, mode="sum", per_sample_weights=weight)

    def index_add() -> Any:
        return torch.zeros(TOKENS, dim).index_add_(0, dst, values.index_select(0, src) * weight[:, None])

    return {"embedding_bag": round(_best(fused) * 1e6), "index_add": round(_best(index_add) * 1e6)}


def _layers() -> dict[str, int]:
    """Gathering layers of a teacher one by one, or interleaved and returned as views."""
    rng, layers = np.random.default_rng(0), (4, 8, 12)
    values, scales = (
        rng.integers(-127, 127, (PARTS, 3, 9000, 128)).astype(np.int8),
        rng.random((PARTS, 3, 9000), np.float32),
    )
    mixed = [Interleaved.empty({layer: LayerSpec("none", 128, "int8") for layer in layers}, 9000) for _ in range(PARTS)]
    for part, records in enumerate(mixed):
        for place, layer in enumerate(layers):
            block = records.blocks()[layer]
            assert block.scales is not None
            block.values[...], block.scales[...] = values[part, place], scales[part, place]
    chosen = zip(rng.integers(0, PARTS, 32).tolist(), rng.integers(0, 8900, 32).tolist(), strict=True)
    spans = [(part, start, start + 32) for part, start in chosen]
    space = np.empty((1024, mixed[0].dtype.itemsize), np.uint8)

    def apart() -> Any:
        for place in range(3):
            for array in (values[:, place], scales[:, place]):
                torch.from_numpy(np.concatenate([array[part, start:end] for part, start, end in spans]))

    def together() -> Any:
        np.concatenate([mixed[part].rows[start:end] for part, start, end in spans], out=space)
        return layers_of(space, mixed[0].dtype)

    return {"apart": round(_best(apart) * 1e6), "interleaved": round(_best(together) * 1e6)}


def _rows() -> dict[str, int]:
    """Ragged rows of several parts: joined as bytes, joined as arrays, or taken token by token."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((24 * 2048, 256), np.float32).astype(np.float16) for _ in range(PARTS)]
    part_of, starts = rng.integers(0, PARTS, 32), 24 * rng.integers(0, 2048, 32)
    spans = list(zip(part_of.tolist(), starts.tolist(), (starts + 24).tolist(), strict=True))
    members = [np.flatnonzero(part_of == part) for part in range(PARTS)]
    there = [(starts[mine][:, None] + np.arange(24)).reshape(-1) for mine in members]
    first = np.empty(32, np.int64)
    first[np.concatenate(members)] = 24 * np.arange(32)
    order = (first[:, None] + np.arange(24)).reshape(-1)

    def whole() -> Any:
        return np.concatenate([arrays[part][begin:end] for part, begin, end in spans])

    views = [array.reshape(-1).view(np.uint8).data for array in arrays]
    of_bytes = [(part, 512 * begin, 512 * end) for part, begin, end in spans]

    def as_bytes() -> Any:
        return np.frombuffer(bytearray().join([views[part][begin:end] for part, begin, end in of_bytes]), np.float16)

    def takes() -> Any:
        return np.concatenate([array.take(tokens, axis=0) for array, tokens in zip(arrays, there, strict=True)]).take(
            order, axis=0
        )

    assert np.array_equal(whole(), takes()) and np.array_equal(whole(), as_bytes().reshape(-1, 256))
    contenders = {"as bytes": as_bytes, "as arrays": whole, "two takes": takes}
    return {name: round(_best(action) * 1e6) for name, action in contenders.items()}


def _batches() -> dict[str, int]:
    """All work of the loader for a batch of decoded parts, by steps per look-up; medians over interleaved epochs."""
    import rivals

    from kdcache.loading import prefetch

    options = argparse.Namespace(rows=16384, dim=256, dtype="float16", tokens=24)
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KDCACHE_HOME"] = str(Path(folder) / "home")
        rivals.write_kdcache(Path(folder), *rivals.make_rows(options))
        source = loader(
            Path(folder) / "kdcache",
            tiny.wordpiece_tokenizer(),
            batch_size=32,
            student_layers=1,
            max_length=128,
            window="all",
        )
        for epoch, together in itertools.product(range(9), (1, 8, 32)):
            prefetch.STEPS_TOGETHER = together
            began = time.process_time()
            count = sum(1 for _ in source.batches(epoch))
            if epoch:  # the first epoch reads files
                taken.setdefault(f"{together} steps at once", []).append((time.process_time() - began) / count)
    return {name: round(statistics.median(found) * 1e6) for name, found in taken.items()}


def _part() -> dict[str, float]:
    """Compute student tokens and an alignment of a part."""
    from kdcache.data.encoding import encode
    from kdcache.loading.alignment import align, student_tokens

    texts = [(" ".join(text for text, _ in tiny.reviews(3, seed=seed)),) for seed in range(4096)]
    student = encode(tiny.wordpiece_tokenizer(), texts, 128)
    teacher = encode(tiny.bytelevel_tokenizer(), texts, 128)
    tokenizer, one, other = tiny.wordpiece_tokenizer(), student_tokens(student), student_tokens(teacher)
    encoding = _best(lambda: encode(tokenizer, texts, 128), rounds=1)
    return {
        "tokens": len(student.input_ids),
        "encode": round(encoding * 1000, 1),
        "align": round(_best(lambda: align(one, other), rounds=1) * 1000, 1),
    }


if __name__ == "__main__":
    main()
