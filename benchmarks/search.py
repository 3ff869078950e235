"""Measures the search for rows in trellis and the projection before it: microseconds per token and layer, one thread.

    python benchmarks/search.py

`search` is the code of a dump on the CPU. `wide` is the same dynamic programming in the large operations for a GPU, run
on the CPU. The two are interleaved. Coordinates are Gaussian, with variances that decrease as in a fine-tuned encoder:
only the bits of the coordinates matter, not the values. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import machine, ratio, rounds, summary

from kdcache.codecs.trellis import coded_dim
from kdcache.codecs.trellis.coder import Coder, search_on_device
from kdcache.codecs.trellis.fit import WINDOW, allot_bits, train_codebook

CASES = ((384, 16), (384, 48), (384, 96), (384, 192), (768, 96), (768, 192))  # width and bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3800, help="of a batch: a dump's have 4,096 with their padding")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine(), "tokens": arguments.tokens}
    for width, size in CASES:
        report[f"width {width}, {size} bytes"] = contest(width, size, arguments.tokens, arguments.rounds)
    json.dump(report, sys.stdout, indent=2)
    print()


def contest(width: int, size: int, tokens: int, count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    variance = np.arange(1, coded_dim(width, size) + 1) ** -1.2
    bits = allot_bits(variance, 8 * size)
    bits = bits[bits > 0]
    scale = np.sqrt(variance[: len(bits)]).astype(np.float32)
    coordinates = torch.randn(tokens, len(bits), generator=generator) * torch.from_numpy(scale)
    codebook = train_codebook(coordinates, bits, scale, rounds=1)
    coder = Coder(codebook, size, "cpu")
    levels = [torch.from_numpy(codebook.tables[depth] * one) for depth, one in zip(bits.tolist(), scale, strict=True)]
    hidden, components = (
        torch.randn(tokens, width, generator=generator),
        torch.randn(width, len(bits), generator=generator),
    )
    taken = rounds(
        {
            "search": timed(lambda: coder(coordinates), tokens),
            "wide": timed(lambda: search_on_device(coordinates, levels, bits.tolist(), WINDOW), tokens),
            "projection": timed(lambda: hidden @ components, tokens),
        },
        count,
    )
    return {
        "coordinates": len(bits),
        **{f"{name}, us per token": summary(values) for name, values in taken.items()},
        "wide / search": ratio(taken["wide"], taken["search"]),
    }


def timed(action: Callable[[], object], tokens: int) -> Callable[[], float]:
    """Microseconds of CPU time per token."""

    def run() -> float:
        began = time.process_time()
        action()
        return (time.process_time() - began) / tokens * 1e6

    return run


if __name__ == "__main__":
    main()
