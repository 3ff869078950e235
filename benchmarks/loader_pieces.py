"""The small choices inside the loader, each against its alternative, on one core: what docs/decisions/0005-loader.md cites.

python benchmarks/loader_pieces.py
"""

from __future__ import annotations

import argparse
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

from kdcache.distill.loader import loader
from kdcache.testing import tiny

TOKENS, TEACHER_TOKENS, PARTS = 1100, 1000, 8  # of a batch of 32 texts


def main() -> None:
    """Print one JSON object; times are the best of five rounds."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for dtype, dim in (("int8", 128), ("float16", 768)):
        found[f"gather {dtype} {dim}, us"] = _gathers(dtype, dim)
        found[f"align {dim}, us"] = _sums(dim)
    found["32 rows of 24 tokens x 256 float16, us"] = _rows()
    found["batch of such rows, us of processor time"] = _batch()
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
    """Weighted sums of teacher tokens: a fused kernel against gather and index_add."""
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


def _gathers(dtype: str, dim: int) -> dict[str, int]:
    """Rows of several parts in row order: two takes against a scatter."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-127, 127, (30_000, dim)).astype(dtype) for _ in range(PARTS)]
    here = np.array_split(rng.permutation(TOKENS), PARTS)
    there = [rng.integers(0, 30_000, len(mine)) for mine in here]
    order = np.argsort(np.concatenate(here))

    def takes() -> Any:
        grouped, begin = np.empty((TOKENS, dim), dtype), 0
        for array, rows in zip(arrays, there, strict=True):
            array.take(rows, axis=0, out=grouped[begin : begin + len(rows)], mode="clip")
            begin += len(rows)
        return grouped.take(order, axis=0)

    def scatter() -> Any:
        packed = np.empty((TOKENS, dim), dtype)
        for array, rows, mine in zip(arrays, there, here, strict=True):
            packed[mine] = array.take(rows, axis=0)
        return packed

    return {"two takes": round(_best(takes) * 1e6), "scatter": round(_best(scatter) * 1e6)}


def _rows() -> dict[str, int]:
    """Long ragged rows of several parts: copied whole against taken token by token."""
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

    def takes() -> Any:
        return np.concatenate([array.take(tokens, axis=0) for array, tokens in zip(arrays, there, strict=True)]).take(
            order, axis=0
        )

    assert np.array_equal(whole(), takes())
    return {"whole rows": round(_best(whole) * 1e6), "two takes": round(_best(takes) * 1e6)}


def _batch() -> dict[str, int]:
    """Everything that the loader does for a batch, parts decoded, one step at a time and eight together; median of epochs."""
    import rivals

    from kdcache.distill import prefetch

    options = argparse.Namespace(rows=4096, dim=256, dtype="float16", tokens=24)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KDCACHE_HOME"] = str(Path(folder) / "home")
        rivals.write_kdcache(Path(folder), *rivals.make_rows(options))
        for together in (1, 8):
            prefetch.STEPS_TOGETHER = together
            source = loader(
                Path(folder) / "kdcache", tiny.wordpiece_tokenizer(), batch_size=32, student_layers=1, max_length=128, window=32
            )
            taken = []
            for epoch in range(9):
                began = time.process_time()
                count = sum(1 for _ in source.batches(epoch))
                taken.append((time.process_time() - began) / count)
            found[f"{together} together"] = round(statistics.median(taken[1:]) * 1e6)
    return found


def _part() -> dict[str, float]:
    """Student tokens and an alignment of a part, made anew."""
    from kdcache.data.encoding import encode
    from kdcache.distill.align_store import student_tokens
    from kdcache.distill.alignment import align

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
