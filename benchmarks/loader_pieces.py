"""The small choices inside the loader, each against its alternative, on one core: what docs/decisions/0005-loader.md cites.

python benchmarks/loader_pieces.py
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

TOKENS, TEACHER_TOKENS, PARTS = 1100, 1000, 8  # of a batch of 32 texts


def main() -> None:
    """Print one JSON object; times are the best of five rounds."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for dtype, dim in (("int8", 128), ("float16", 768)):
        found[f"gather {dtype} {dim}, us"] = _gathers(dtype, dim)
        found[f"align {dim}, us"] = _sums(dim)
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


def _part() -> dict[str, float]:
    """Student tokens and an alignment of a part, made anew."""
    from kdcache.data.encoding import encode
    from kdcache.distill.align_store import student_tokens
    from kdcache.distill.alignment import align
    from kdcache.testing import tiny

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
