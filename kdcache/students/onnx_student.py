"""A student as an ONNX graph on the CPU: quantised, run by onnxruntime, compared with PyTorch, and timed."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcache.data.encoding import pad, token_budget_batches
from kdcache.errors import ModelError, first_line
from kdcache.training.predict import EVALUATION_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

    from kdcache.data.encoding import EncodedTexts

BATCHES = (1, 32)  # texts of one forward pass that latency is measured for
_REPEATS = 20  # forward passes per batch size, at most
_SECONDS = 3.0  # per batch size, at most
Forward = Callable[[Mapping[str, "Tensor"]], np.ndarray]  # padded inputs -> logits float32 [batch, classes]


def quantise(source: Path, target: Path) -> None:
    """Write ``source`` with weights in int8 to ``target``; activations are quantised as they come (dynamic).

    Raises ModelError if onnxruntime cannot quantise the graph, or finds nothing in it to quantise.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(str(source))
    del graph.graph.value_info[:]  # the exporter's shapes of weights, some of which onnxruntime transposes
    cure = "Export without --int8."
    dimensions = {weight.name: len(weight.dims) for weight in graph.graph.initializer}
    vectors = [node.name for node in graph.graph.node if dimensions.get((*node.input, "", "")[1], 2) < 2]
    try:
        with _quiet_root():  # a product with a vector, as in attention pooling, has no channels: it would not run
            quantize_dynamic(
                graph, str(target), weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=vectors
            )
    except Exception as error:  # onnx and onnxruntime raise many unrelated classes
        reason = first_line(error)
        raise ModelError(f"onnxruntime cannot quantise the student: {reason}", cure) from error
    if not any(node.op_type == "MatMulInteger" for node in onnx.load(str(target)).graph.node):
        raise ModelError("onnxruntime found no matrix product in the student that it can quantise", cure)


@contextmanager
def _quiet_root() -> Iterator[None]:
    """Hide the advice of onnxruntime to preprocess the graph, which a graph of this exporter does not need."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)


def open_graph(path: Path) -> Forward:
    """A graph on the CPU, with as many threads as PyTorch has. Raises ModelError if onnxruntime cannot load it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no public base
        reason = first_line(error)
        raise ModelError(f"onnxruntime cannot load the exported student: {reason}", "Export without --int8.") from error
    names = [node.name for node in session.get_inputs()]

    def forward(inputs: Mapping[str, Tensor]) -> np.ndarray:
        logits: np.ndarray = session.run(["logits"], {name: inputs[name].numpy() for name in names})[0]
        return logits

    return forward


def in_torch(model: torch.nn.Module) -> Forward:
    """A student of PyTorch as the same kind of function."""

    def forward(inputs: Mapping[str, Tensor]) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = model(inputs).logits.numpy()
        return logits

    return forward


def all_logits(forwards: Sequence[Forward], encoded: EncodedTexts, pad_token_id: int) -> list[np.ndarray]:
    """Logits float32 [texts, classes] of each function, in the order of the texts; all get the same batches."""
    found: list[list[np.ndarray]] = [[] for _ in forwards]
    batches = token_budget_batches(encoded.lengths, EVALUATION_TOKENS)
    for rows in batches:
        inputs = pad(encoded, rows, pad_token_id)
        for own, forward in zip(found, forwards, strict=True):
            own.append(forward(inputs))
    back = np.argsort(np.concatenate(batches))
    return [np.concatenate(own)[back] for own in found]


@dataclass(frozen=True)
class Parity:
    """How the logits of two models differ. ``largest``: absolute; ``relative``: of the largest logit, at least 1."""

    largest: float
    relative: float
    changed: int  # rows with another prediction
    rows: int


def parity(ours: np.ndarray, reference: np.ndarray) -> Parity:
    """Compare logits [rows, classes]; a logit that is not finite is infinitely far away."""
    difference = np.abs(ours.astype(np.float64) - reference)
    largest = float(np.where(np.isfinite(difference), difference, np.inf).max(initial=0.0))
    scale = max(1.0, float(np.abs(reference[np.isfinite(reference)]).max(initial=0.0)))
    changed = int((ours.argmax(axis=1) != reference.argmax(axis=1)).sum())
    return Parity(largest, largest / scale, changed, len(reference))


def latencies(forwards: Sequence[Forward], encoded: EncodedTexts, pad_token_id: int) -> list[dict[int, float]]:
    """Median milliseconds of a forward pass of each function, by texts per batch, without tokenisation.

    The functions take turns on the same batches, so that another load of the machine meets all of them.
    """
    found: list[dict[int, float]] = [{} for _ in forwards]
    for size in BATCHES:
        taken: list[list[float]] = [[] for _ in forwards]
        end = time.perf_counter() + _SECONDS * len(forwards)
        for repeat in range(-1, _REPEATS):  # the first pass warms up
            inputs = pad(encoded, (np.arange(size) + max(repeat, 0) * size) % len(encoded), pad_token_id)
            for own, forward in zip(taken, forwards, strict=True):
                started = time.perf_counter()
                forward(inputs)
                if repeat >= 0:
                    own.append(time.perf_counter() - started)
            if repeat >= 0 and time.perf_counter() > end:
                break
        for of_all, own in zip(found, taken, strict=True):
            of_all[size] = round(1000 * statistics.median(own), 3)
    return found
