"""Which of a text's hidden states are a target: all of them, that of the first token, or their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from kdcache.codecs.base import TokenSelection


def select_tokens(hidden: Tensor, lengths: np.ndarray, selection: TokenSelection) -> Tensor:
    """[rows, width] of packed ``hidden`` [tokens, width].

    Its rows as they are, or one row for each text of ``lengths`` tokens.
    """
    if selection == "all":
        return hidden
    import torch

    counts = torch.as_tensor(lengths, dtype=torch.int64, device=hidden.device)
    starts = counts.cumsum(0) - counts
    if selection == "first":
        return hidden[starts]
    return torch.segment_reduce(hidden.float(), "mean", lengths=counts, axis=0)
