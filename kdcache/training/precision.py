"""The device and the mixed precision of a training, through accelerate: one process, CPU or one GPU.

Mixed precision is autocast: weights, moments and the shared head's softmax stay in float32. fp16 needs the gradient scaler too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


def check_precision(precision: str, device: torch.device) -> None:
    """RecipeError where training in ``precision`` does not work on ``device``: fp16 needs the gradient scaler of a GPU."""
    if precision == "fp16" and device.type == "cpu":
        raise RecipeError("precision 'fp16' needs a GPU; this machine trains on the CPU", "Use float32, or bf16.")


def make_accelerator(precision: str) -> Accelerator:
    """An accelerator of one process; RecipeError where the device cannot do ``precision``."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    mixed = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}[precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()  # accelerate keeps one precision per process; stages of one run may differ
    accelerator = Accelerator(mixed_precision=mixed)
    check_precision(precision, accelerator.device)
    if accelerator.num_processes > 1:
        raise RecipeError(
            f"kdcache trains in one process; it was started in {accelerator.num_processes}",
            "Start it with python, not accelerate launch.",
        )
    return accelerator
