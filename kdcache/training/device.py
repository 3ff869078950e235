"""The device of models, and the precision that it can train in."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from kdcache.errors import RecipeError
from kdcache.training import processes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator
    from torch import Tensor


def default_device() -> torch.device:
    """The device of models outside training: CUDA if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_precision(precision: str, device: torch.device) -> None:
    """RecipeError if ``device`` cannot train in ``precision``: fp16 needs the gradient scaler of a GPU."""
    if precision == "fp16" and device.type == "cpu":
        raise RecipeError("precision 'fp16' needs a GPU; this machine trains on the CPU", "Use float32, or bf16.")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``. A GPU copies it from pinned memory, so that the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextlib.contextmanager
def float32_products(tf32: bool | None) -> Iterator[None]:
    """While the block runs, matrix products of float32 tensors on a GPU are in TF32, or not; None changes nothing."""
    if tf32 is None or default_device().type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def make_accelerator(precision: str) -> Accelerator:
    """The accelerator of this process; RecipeError if the device cannot train in ``precision``.

    RecipeError also where several processes were started and did not join.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if processes.current().world == 1:
        processes.check_alone("this command")
    mixed = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}[precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()  # accelerate fixes the precision per process, but stages may differ
    accelerator = Accelerator(mixed_precision=mixed)
    check_precision(precision, accelerator.device)
    return accelerator
