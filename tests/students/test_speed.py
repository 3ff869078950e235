"""What a classifier is timed on; the clock is made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdcache.students import speed
from kdcache.students.speed import Speed, measure_speed
from kdcache.testing.tiny import wordpiece_tokenizer


class Timed(torch.nn.Module):
    """A classifier that takes a second for each batch and a tenth of one for each text."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rows: list[int] = []
        self.now = 0.0

    def forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        assert not self.training
        assert not torch.is_grad_enabled()
        rows = len(inputs["input_ids"])
        self.rows.append(rows)
        self.now += 1.0 + 0.1 * rows
        return SimpleNamespace(logits=torch.zeros(rows, 2))


def timed(monkeypatch: pytest.MonkeyPatch, texts: int, seconds: float) -> tuple[list[int], Speed]:
    """Rows of every batch, and the result, where ``seconds`` are allowed for each of the two."""
    model = Timed().train()
    limits = {"_LATENCY_TEXTS": 30, "_THROUGHPUT_TEXTS": 96, "_SECONDS": seconds}
    for name, value in limits.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: model.now))
    monkeypatch.setattr(speed, "default_device", lambda: torch.device("cpu"))
    found = measure_speed(model, wordpiece_tokenizer(), 16, [(f"good film {number}",) for number in range(texts)])
    return model.rows, found


def test_single_texts_and_batches_are_timed_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, found = timed(monkeypatch, 200, 1000.0)
    assert rows == [1] * 32 + [32] * 3
    assert found == Speed("cpu", 1100.0, round(96 / (3 * 4.2), 1))


def test_few_texts_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, found = timed(monkeypatch, 5, 1000.0)
    assert rows == [1] * 7 + [5]
    assert found.texts_per_second == round(5 / 1.5, 1)


def test_a_slow_machine_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, found = timed(monkeypatch, 200, 3.0)
    assert rows == [1] * (2 + 3) + [32]
    assert found == Speed("cpu", 1100.0, round(32 / 4.2, 1))
