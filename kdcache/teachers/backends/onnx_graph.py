"""Writes a model as one ONNX graph: the exporter that teachers and students share."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError, first_line


def write_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Callable[[], Sequence[str]],
    path: Path,
    *,
    subject: str,
    cure: str,
) -> None:
    """Write ``module``, which takes the tensors of ``inputs`` in their order, with dynamic batch and length.

    Args:
        module: in eval mode; returns a tensor, or a tuple of them.
        inputs: by name, [batch, tokens] each. The graph is traced with them.
        outputs: gives the names of the outputs; it may run the module.
        path: the file; weights of more than 2 GB are written beside it.
        subject: who cannot be exported, for the message.
        cure: the hint of the error.

    Raises:
        ModelError: torch cannot export the module.
    """
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=list(outputs()),
                dynamo=True,
                dynamic_shapes=(tuple(dict(dynamic) for _ in inputs),),
                verbose=False,
            )
            if program is None:
                raise RuntimeError("the exporter gave no program")
            program.save(str(path))
    except Exception as error:  # the exporter's passes raise many unrelated classes
        raise ModelError(
            f"{subject} cannot be exported to ONNX: {type(error).__name__}: {first_line(error)}",
            cure,
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the messages of torch's exporter about itself, such as a missing torchvision."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)
