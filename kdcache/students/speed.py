"""How fast a classifier is on this machine: latency of single texts, and throughput in batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdcache.data.encoding import encode, pad
from kdcache.training.device import default_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LATENCY_TEXTS = 30
_THROUGHPUT_TEXTS = 96
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
    texts = texts[:_THROUGHPUT_TEXTS]
    encoded, padding = encode(tokenizer, texts, max_length), int(tokenizer.pad_token_id or 0)

    def seconds(rows: Sequence[int]) -> float:
        inputs = {name: tensor.to(device) for name, tensor in pad(encoded, rows, padding).items()}
        started = time.perf_counter()
        model(inputs).logits.cpu()  # the copy waits for the device
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
        singles = measured([[row] for row in range(min(len(texts), _LATENCY_TEXTS))])
        whole = measured([range(first, min(first + 32, len(texts))) for first in range(0, len(texts), 32)])
    latency = statistics.median(time_taken for _, time_taken in singles)
    rate = sum(count for count, _ in whole) / sum(time_taken for _, time_taken in whole)
    return Speed(device.type, round(1000 * latency, 3), round(rate, 1))
