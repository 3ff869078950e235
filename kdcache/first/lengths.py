"""How long the texts of a task are in tokens, on a sample: measured with a tokenizer at hand, else from words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE = 2_000
_LATIN_ENDS = "\u0250"  # letters from here on are of other scripts
_LONGEST = 512


@dataclass(frozen=True)
class Lengths:
    """Tokens per text with special tokens. ``measured``: with a tokenizer, else estimated from words."""

    mean: float
    high: float  # 99 of 100 texts are not longer
    measured: bool
    latin: bool  # most letters are Latin

    def max_length(self, positions: int | None = None) -> int:
        """A multiple of 8 with a quarter to spare, for teachers with longer tokens; at most ``positions``."""
        most = min(_LONGEST, positions or _LONGEST)
        return max(8, min(math.ceil(max(16.0, 1.25 * self.high) / 8) * 8, most // 8 * 8))


def measure(texts: Sequence[tuple[str, ...]], tokenizer: Path | None = None) -> Lengths:
    """Lengths on an evenly spaced sample; ``tokenizer``: a ``tokenizer.json``. One text at least."""
    sample = texts[:: max(1, len(texts) // _SAMPLE)]
    latin = _is_latin(sample)
    counts = _counted(sample, tokenizer) if tokenizer is not None else None
    lengths = sorted(counts or [_estimated(text, latin=latin) for text in sample])
    high = lengths[min(len(lengths) - 1, math.ceil(0.99 * len(lengths)) - 1)]
    return Lengths(sum(lengths) / len(lengths), high, counts is not None, latin)


def _counted(sample: Sequence[tuple[str, ...]], file: Path) -> list[float] | None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library raises bare exceptions; the stage that needs the tokenizer names the fault
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [float(len(tokenizer.encode(text[0], text[1] if len(text) > 1 else None).ids)) for text in sample]


def _estimated(text: tuple[str, ...], *, latin: bool) -> float:
    """1.4 tokens per word or 4.5 characters per token, the larger; 1.5 characters in scripts without spaces."""
    joined = " ".join(text)
    tokens = max(1.4 * len(joined.split()), len(joined) / 4.5) if latin else len(joined) / 1.5
    return tokens + 1 + len(text)


def _is_latin(sample: Sequence[tuple[str, ...]]) -> bool:
    letters = [letter for text in sample for part in text for letter in part[:500] if letter.isalpha()]
    return sum(letter >= _LATIN_ENDS for letter in letters) <= 0.2 * len(letters)
