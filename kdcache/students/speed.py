"""How fast a classifier is on this machine: latency of single texts, and throughput in batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdcache.data.encoding import EncodedTexts, encode, pad
from kdcache.training.device import default_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LATENCY_TEXTS = 30
_THROUGHPUT_TEXTS = 96
_BATCH = 32
_SECONDS = 2.0  # at most, for each of the two; a busy machine must not hold up the training


@dataclass(frozen=True)
class Speed:
    """Measured on this machine after a warm-up, without tokenisation. ``latency_ms``: median of single texts."""

    device: str
    latency_ms: float
    texts_per_second: float  # in batches of 32 texts


def measure_speed(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, max_length: int, texts: Sequence[tuple[str, ...]]
) -> Speed:
    """Measure a model on ``texts``, on the device that training would take."""
    device = default_device()
    model.to(device).eval()
    encoded = encode(tokenizer, texts[:_THROUGHPUT_TEXTS], max_length)

    def run(inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model({name: tensor.to(device) for name, tensor in inputs.items()}).logits
        return logits

    return time_forward(run, encoded, int(tokenizer.pad_token_id or 0), device.type)


def time_forward(
    run: Callable[[dict[str, Tensor]], Tensor],
    encoded: EncodedTexts,
    pad_token_id: int,
    device: str,
    max_tokens: int | None = None,
) -> Speed:
    """Time forward passes.

    Args:
        run: padded inputs of one batch to logits, on ``device``.
        encoded: the texts, of which the first 96 are used.
        pad_token_id: of the tokenizer.
        device: its type, for the result.
        max_tokens: padded tokens of a batch, if it shall have less than 32 texts for long texts.
    """
    texts = min(len(encoded), _THROUGHPUT_TEXTS)
    longest = int(encoded.lengths[:texts].max())
    size = _BATCH if max_tokens is None else max(1, min(_BATCH, max_tokens // longest))

    def seconds(rows: Sequence[int]) -> float:
        inputs = pad(encoded, rows, pad_token_id)
        started = time.perf_counter()
        run(inputs).cpu()  # the copy waits for the device
        return time.perf_counter() - started

    def measured(batches: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
        """(texts, seconds) of each batch; at least one, then as many as fit into ``_SECONDS``."""
        times, end = [], time.perf_counter() + _SECONDS
        for rows in batches:
            times.append((len(rows), seconds(rows)))
            if time.perf_counter() > end:
                break
        return times

    with torch.no_grad():
        seconds([0]), seconds([0])
        singles = measured([[row] for row in range(min(texts, _LATENCY_TEXTS))])
        whole = measured([range(first, min(first + size, texts)) for first in range(0, texts, size)])
    latency = statistics.median(time_taken for _, time_taken in singles)
    rate = sum(count for count, _ in whole) / sum(time_taken for _, time_taken in whole)
    return Speed(device, round(1000 * latency, 3), round(rate, 1))
