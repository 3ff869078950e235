"""What a cache remembers of a teacher's tokens: where each one lies in its text, and which part the special ones play.

Token numbers are not stored: a student with another tokenizer needs spans and roles, and nothing else, to align itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TEXT = 0  # a token of the text, with a character span
FIRST = 1  # [CLS] or <s> at the start
MIDDLE = 2  # separators between the columns of a pair
LAST = 3  # the final [SEP] or </s>
OTHER = 4  # any other special token

ROLES = {"text": TEXT, "first": FIRST, "middle": MIDDLE, "last": LAST, "other": OTHER}


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
    """What a teacher predicts for the ``n`` texts of a part."""

    logits: np.ndarray  # float32[n, classes], raw: never a probability
    pooled: np.ndarray | None = None  # float32[n, width]
