"""The seam between a teacher and whatever runs it.

A backend takes padded inputs and gives back what a cache stores: logits, the pooled vector, and the hidden states of
the layers asked for, already packed (padding dropped), so that nothing downstream ever sees padding. Results stay on
the backend's device: projecting there moves fewer bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TeacherOutput:
    """What one forward pass gives: ``logits`` float32 [B, C], ``pooled`` float32 [B, w] or None, ``hidden`` per layer
    float32
    [P, width], where the P valid tokens lie row after row.
    """

    logits: Tensor
    pooled: Tensor | None
    hidden: Mapping[int, Tensor]


class TeacherBackend(Protocol):
    """A teacher that is ready to run, without gradients and without dropout.

    ``record`` says what a reader of the cache may want to know of this backend (device, parity with torch), as strings.
    """

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def record(self) -> Mapping[str, str]: ...

    def run(self, inputs: dict[str, Tensor], layers: Sequence[int], pooled: bool) -> TeacherOutput:
        """Run ``inputs`` (``input_ids`` and ``attention_mask`` [B, L], others as the tokenizer gives them)."""
        ...

    def close(self) -> None:
        """Free the device's memory; the backend is not used afterwards."""
        ...
