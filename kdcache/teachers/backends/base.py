"""The seam between a teacher and the library that runs it.

A backend takes padded inputs and returns the components of a cache: logits, the pooled vector, and the hidden states of
some layers. Hidden states are packed: rows of padding are removed, so no other module handles padding. Results stay on
the backend's device, because projecting there moves fewer bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TeacherOutput:
    """The outputs of one forward pass."""

    logits: Tensor  # float32 [batch, classes]
    pooled: Tensor | None  # float32 [batch, width]
    hidden: Mapping[int, Tensor]  # by layer: float32 [tokens, width], the valid tokens of all texts in order


def valid_places(attention_mask: Tensor) -> Tensor:
    """Places int64 [tokens] of the valid tokens of a mask [batch, tokens], counted over the whole batch.

    For a mask on the host: an accelerator would have to say how many there are, and the host would wait.
    """
    return attention_mask.reshape(-1).nonzero().squeeze(1)


def packed(states: Tensor, places: Tensor) -> Tensor:
    """The rows [tokens, width] of ``states`` [batch, tokens, width] at ``places`` of ``valid_places``."""
    return states.flatten(0, 1).index_select(0, places)


class TeacherBackend(Protocol):
    """A teacher that is ready to run, without gradients and without dropout."""

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def record(self) -> Mapping[str, str]:
        """Facts about this backend for the provenance of the cache: device, difference from torch."""
        ...

    def run(self, inputs: dict[str, Tensor], layers: Sequence[int], pooled: bool) -> TeacherOutput:
        """Run ``inputs``: ``input_ids`` and ``attention_mask`` [batch, tokens], and others that the tokenizer gives."""
        ...

    def close(self) -> None:
        """Free the device's memory; the backend is not used afterwards."""
        ...
