"""Forward passes within the memory of a device: how many tokens fit, and what happens if they do not.

A batch that does not fit runs in pieces of its rows, which keep the padding of the batch. On a CPU, where it was tried,
every bit is then the same, apart from the logits of pieces of one to three rows. A GPU may select other kernels for
fewer rows, as another GPU does (docs/decisions/0017).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdcache.errors import KdcacheError
from kdcache.teachers.backends.base import TeacherBackend, TeacherOutput

if TYPE_CHECKING:
    from kdcache.cache.spec import TeacherSpec

_NO_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "Failed to allocate memory", "out of memory")  # not torch's own exception
_PROBED = (2048, 8192)  # tokens; the difference is free of what a process takes once
_LEAST, _MOST = 1024, 32768  # tokens; more are not faster
_SHARE = 0.5  # of the free memory: the results of batches that wait, and fragmentation


class FittingBackend:
    """A backend whose batches run in halves, quarters … of their rows once its device ran out of memory.

    ``note`` gets one line when this happens.
    """

    def __init__(self, backend: TeacherBackend, teacher: str, note: Callable[[str], None]) -> None:
        self._backend, self._teacher, self._note = backend, teacher, note
        self._limit: int | None = None  # padded tokens of one forward pass
        self.name, self.precision, self.device = backend.name, backend.precision, backend.device

    @property
    def record(self) -> Mapping[str, str]:
        limited = {} if self._limit is None else {"tokens_per_forward_pass": str(self._limit)}
        return {**self._backend.record, **limited}

    def run(self, inputs: dict[str, Tensor], layers: Sequence[int], pooled: bool) -> TeacherOutput:
        rows, tokens = inputs["input_ids"].shape
        while True:
            size = rows if self._limit is None else max(1, min(rows, self._limit // tokens))
            try:
                return self._in_pieces(inputs, layers, pooled, size)
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                if size == 1:
                    raise KdcacheError(
                        f"teacher '{self._teacher}': one text of {tokens} tokens does not fit into the memory of the "
                        f"device ({self.device})",
                        "Free memory of the device, or lower max_length or dump.precision.",
                    ) from error
            # behind the handler: its traceback holds tensors
            _release(self.device)
            self._limit = size // 2 * tokens
            self._note(
                f"teacher '{self._teacher}': out of memory with {size * tokens:,} tokens in a forward pass; from here "
                f"on at most {self._limit:,}"
            )

    def close(self) -> None:
        self._backend.close()

    def _in_pieces(self, inputs: dict[str, Tensor], layers: Sequence[int], pooled: bool, size: int) -> TeacherOutput:
        rows = len(inputs["input_ids"])
        if size >= rows:
            return self._backend.run(inputs, layers, pooled)
        count = -(-rows // size)
        borders = [rows * number // count for number in range(count + 1)]  # no small rest: few rows have other kernels
        pieces = [
            self._backend.run({name: tensor[first:last] for name, tensor in inputs.items()}, layers, pooled)
            for first, last in itertools.pairwise(borders)
        ]
        vectors = [piece.pooled for piece in pieces if piece.pooled is not None]
        return TeacherOutput(
            torch.cat([piece.logits for piece in pieces]),
            torch.cat(vectors) if vectors else None,
            {layer: torch.cat([piece.hidden[layer] for piece in pieces]) for layer in layers},
        )


def tokens_that_fit(backend: TeacherBackend, spec: TeacherSpec, free: Callable[[], int] | None = None) -> int | None:
    """Padded tokens of a forward pass that fit into half of the free memory of a GPU: a power of two; None elsewhere.

    Measured with two passes over made-up texts of ``max_length`` tokens. ``free`` gives the free bytes of the device.
    """
    if backend.device != "cuda":
        return None
    free = free or _free_bytes
    left = []
    for tokens in _PROBED:
        shape = max(1, tokens // spec.max_length), spec.max_length
        inputs = {"input_ids": torch.zeros(shape, dtype=torch.int64), "attention_mask": torch.ones(shape).long()}
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        backend.run(inputs, tuple(spec.layers), spec.pooled is not None)
        left.append(free())
    per_token = (left[0] - left[1]) / (_PROBED[1] - _PROBED[0])
    wanted = _SHARE * left[0] / per_token if per_token > 0 else _MOST
    return 1 << (int(min(max(wanted, _LEAST), _MOST)).bit_length() - 1)


def _free_bytes() -> int:
    """Free memory of the GPU, without what torch and ONNX Runtime have taken and keep."""
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def _release(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY)
