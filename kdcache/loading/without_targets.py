"""Batches without targets and without a cache, for the ``fine-tune`` baseline.

The trainer needs no special case: this is a ``TargetSource`` without teachers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kdcache.data.encoding import encode, pad
from kdcache.loading.assembly import longest_first
from kdcache.loading.order import Epochs
from kdcache.loading.targets import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdcache.loading.data import StudentData
    from kdcache.loading.order import BatchSettings
    from kdcache.methods.parts.layer_map import LayerMap
    from kdcache.training.processes import Processes


class PlainBatches:
    """The labelled and unlabelled rows of ``train``, in another order in every epoch."""

    def __init__(self, data: StudentData, tokenizer: PreTrainedTokenizerBase, settings: BatchSettings) -> None:
        self.teachers: tuple[str, ...] = ()
        self.layer_map: LayerMap = {}
        self.skipped = 0
        self.coverage: dict[str, float] = {}
        self._train = data.examples("train")
        one_part = np.zeros(len(self._train), np.int32)
        self._epochs = Epochs(one_part, replace(settings, window=1))
        self._encoded = encode(tokenizer, data.texts_of("train"), settings.max_length)
        self._pad_token_id = int(tokenizer.pad_token_id or 0)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; the last may have fewer rows."""
        return self._epochs.steps

    @property
    def truncated(self) -> float | None:
        """Share of the rows that are cut to ``max_length``."""
        return self._encoded.truncated_count / len(self._encoded) if len(self._encoded) else None

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from ``first_step`` on."""
        order, train = self._epochs.order(epoch), self._train
        for step in self._epochs.steps_here(order, first_step):
            rows = self._epochs.rows(order, step)
            rows = rows[longest_first(self._encoded.lengths[rows])]
            inputs = pad(self._encoded, rows, self._pad_token_id)
            yield Batch(inputs, torch.from_numpy(train.labels[rows]), train.text_ids[rows], None)

    def count_together(self, processes: Processes) -> None:
        """Every process counts all rows anyway."""

    def layers_at(self, epoch: int) -> LayerMap:  # noqa: ARG002 - of the protocol
        """There are no teachers."""
        return {}

    def target_dim(self, teacher: str, layer: int) -> int:
        """There are no teachers."""
        raise KeyError((teacher, layer))

    def target_variance(self, teacher: str, layer: int) -> float:
        """There are no teachers."""
        raise KeyError((teacher, layer))

    def logits_for(self, split: str) -> Tensor:  # noqa: ARG002 - of the protocol
        """[0, 0, 0]: there are no teachers."""
        return torch.empty(0, 0, 0)
