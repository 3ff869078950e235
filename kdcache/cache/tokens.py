"""Outputs of a teacher for a part, and its tokens: the span of each one in its text, and the roles of special tokens.

Token ids are not stored: a student with another tokenizer needs only spans and roles for the alignment. The checks run
before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdcache.errors import NonFiniteError

if TYPE_CHECKING:
    from kdcache.cache.spec import TeacherSpec

TEXT = 0  # a token of the text, with a character span
FIRST = 1  # [CLS] or <s> at the start
MIDDLE = 2  # separators between the columns of a pair
LAST = 3  # the final [SEP] or </s>
OTHER = 4  # any other special token

_HINT = "Look at that text and at the teacher; a half-precision backend may overflow: try precision = 'float32'."


@dataclass(frozen=True)
class Tokens:
    """The tokens of ``n`` texts, ragged and packed: text ``i`` owns rows ``offsets[i]:offsets[i + 1]``."""

    offsets: np.ndarray  # int64[n + 1]
    starts: np.ndarray  # int32[T]; characters (code points) of the token's own column
    ends: np.ndarray  # int32[T]; exclusive
    segments: np.ndarray  # int8[T]; the column, 0 or 1; -1 for special tokens
    roles: np.ndarray  # int8[T]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per text, ``int64[n]``."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Outputs:
    """Predictions of a teacher for the ``n`` texts of a part."""

    logits: np.ndarray  # float32[n, classes], raw: never a probability
    pooled: np.ndarray | None = None  # float32[n, width]


def check_outputs(outputs: Outputs, spec: TeacherSpec, part: str, ids: np.ndarray) -> None:
    """Raises ValueError for a wrong shape or dtype, NonFiniteError (with text id) for NaN or infinity."""
    wanted = {"logits": (outputs.logits, spec.target.shape[0])}
    if (outputs.pooled is None) != (spec.pooled is None):
        raise ValueError(
            f"teacher '{spec.name}' is declared with pooled {spec.pooled}, which its outputs of {part} contradict"
        )
    if outputs.pooled is not None and spec.pooled is not None:
        wanted["pooled"] = (outputs.pooled, spec.pooled)
    for name, (values, width) in wanted.items():
        if values.shape != (len(ids), width) or values.dtype != np.float32:
            raise ValueError(
                f"{name} of {part} is {values.dtype}{list(values.shape)}, expected float32{[len(ids), width]}"
            )
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise not_finite(name, spec, part, ids, int(bad.argmax()))


def check_tokens(tokens: Tokens, part: str, texts: int) -> None:
    """Raises ValueError if offsets, lengths, dtypes or roles are inconsistent."""
    total = len(tokens.starts)
    offsets = tokens.offsets
    if (
        offsets.dtype != np.int64
        or len(offsets) != texts + 1
        or offsets[0] != 0
        or offsets[-1] != total
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(f"offsets of {part} are not int64[{texts + 1}] from 0 to {total}")
    for name, dtype in (("starts", np.int32), ("ends", np.int32), ("segments", np.int8), ("roles", np.int8)):
        values = getattr(tokens, name)
        if values.dtype != dtype or values.shape != (total,):
            raise ValueError(
                f"{name} of {part} is {values.dtype}{list(values.shape)}, expected {np.dtype(dtype)}[{total}]"
            )
    if total and (tokens.roles.min() < 0 or tokens.roles.max() > OTHER or (tokens.starts > tokens.ends).any()):
        raise ValueError(f"tokens of {part} have an unknown role, or an end before its start")


def not_finite(what: str, spec: TeacherSpec, part: str, ids: np.ndarray, row: int) -> NonFiniteError:
    text = bytes(ids[row]).hex()
    return NonFiniteError(
        f"teacher '{spec.name}' gave a value that is not finite in {what} for text {text} ({part}, row {row})", _HINT
    )
