"""Logits of a model for many texts: the one inference loop of validation, scores and ``kdcache evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.data.encoding import EncodedTexts, pad, token_budget_batches

if TYPE_CHECKING:
    from torch import nn

EVALUATION_TOKENS = 4096  # padded tokens of one forward pass


def predict(
    model: nn.Module, encoded: EncodedTexts, pad_token_id: int, max_tokens: int = EVALUATION_TOKENS
) -> np.ndarray:
    """Logits float32 [texts, classes] in the order of the texts; [0, 0] without texts.

    ``model`` takes padded inputs and returns an object with ``logits``. It runs in eval mode without gradients, on
    batches of similar length with at most ``max_tokens`` padded tokens; its mode is restored afterwards.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    logits = np.empty((0, 0), np.float32)
    with torch.no_grad():
        for rows in token_budget_batches(encoded.lengths, max_tokens):
            inputs = {name: tensor.to(device) for name, tensor in pad(encoded, rows, pad_token_id).items()}
            batch = model(inputs).logits.float().cpu().numpy()
            if not logits.size:
                logits = np.empty((len(encoded), batch.shape[1]), np.float32)
            logits[rows] = batch
    model.train(training)
    return logits
