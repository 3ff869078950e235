"""The rows that an exported student is compared with PyTorch on: real ones, else random token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdcache.data.encoding import EncodedTexts, encode

if TYPE_CHECKING:
    from kdcache.students.model import Student

_MOST_ROWS = 2000
_SYNTHETIC_ROWS, _SYNTHETIC_LENGTH = 64, 64


@dataclass(frozen=True)
class Rows:
    """The rows that the graphs are compared on; ``labels`` is None where there is nothing to score."""

    name: str
    encoded: EncodedTexts
    labels: np.ndarray | None


def some_rows(name: str, student: Student, texts: Sequence[tuple[str, ...]], labels: np.ndarray | None) -> Rows:
    """The first rows of ``texts``; the name says how many there are if some are left out."""
    if len(texts) > _MOST_ROWS:
        name = f"{name}, the first {_MOST_ROWS:,} of {len(texts):,} rows"
        texts, labels = texts[:_MOST_ROWS], None if labels is None else labels[:_MOST_ROWS]
    labels = labels if labels is not None and (labels >= 0).any() else None
    return Rows(name, encode(student.tokenizer, texts, student.max_length), labels)


def synthetic_rows(student: Student) -> Rows:
    """Random tokens without special ones: good enough to compare two ways to run a model, not to score one."""
    generator = np.random.default_rng(0)
    longest = min(student.max_length, _SYNTHETIC_LENGTH)
    lengths = generator.integers(min(4, longest), longest + 1, _SYNTHETIC_ROWS)
    special = set(student.tokenizer.all_special_ids)
    known = np.array([one for one in range(len(student.tokenizer)) if one not in special], np.int32)
    total = int(lengths.sum())
    nothing = np.zeros(total, np.int32)
    types = nothing.astype(np.int8) if "token_type_ids" in student.tokenizer.model_input_names else None
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = nothing.astype(np.int8)
    made = EncodedTexts(generator.choice(known, total), offsets, nothing, nothing, flat, flat, types)
    return Rows("synthetic token ids", made, None)
