"""Selects the hidden states of a text that are stored: all, that of the first token, or their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from kdcache.codecs.base import TokenSelection


def select_tokens(hidden: Tensor, lengths: np.ndarray, selection: TokenSelection) -> Tensor:
    """Rows [rows, width] of packed ``hidden`` [tokens, width]: all, or one per text of ``lengths`` tokens."""
    if selection == "all":
        return hidden
    import torch

    counts = torch.as_tensor(lengths, dtype=torch.int64)
    if hidden.device.type == "cuda":
        counts = counts.pin_memory()  # else the copy waits for the device
    counts = counts.to(hidden.device, non_blocking=True)
    starts = counts.cumsum(0) - counts
    if selection == "first":
        return hidden[starts]
    # unsafe: without a check of the lengths, for which the host would wait for the device
    return torch.segment_reduce(hidden.float(), "mean", lengths=counts, axis=0, unsafe=True)
