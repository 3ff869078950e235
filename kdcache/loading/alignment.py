"""Alignment of a student's tokens with a teacher's: which teacher tokens make up the target of which student token.

A loss between tokens of two vocabularies is undefined without it. The target of a student token is the mean of the
teacher tokens that overlap its character span, weighted by the overlap. Special tokens are paired by role: first
([CLS], <s>), separator, last ([SEP], </s>). A student token without any overlap (zero width, other special tokens, text
that the teacher truncated) has no target and is masked.

All texts of a part are aligned at once. (text, segment, character) becomes one number, and overlapping tokens are found
by binary search. Spans may be unsorted, equal (byte fallback), nested or empty.

Tokens and alignments of a part are kept on disk (``StudentTokens``), under a hash of all that they depend on: the next
run with the same student reads them instead of tokenizing again. They are a cache: a damaged or missing file is made
again, and a disk that takes no files is logged once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.tokens import FIRST, LAST, MIDDLE, TEXT, Tokens
from kdcache.data.encoding import TRUNCATION, EncodedTexts, encode, tokenizer_fingerprint
from kdcache.errors import DamageError
from kdcache.runs import home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_PAIRS_PER_TOKEN = 64  # on average over a part; what tokenizers give is below 4
_CANDIDATES_AT_ONCE = 1 << 22  # bounds memory where a damaged or hostile cache holds spans that all overlap

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]  # student token, teacher token, overlap


@dataclass(frozen=True, eq=False)
class PartAlignment:
    """The alignment of a part's n texts, in CSR layout: one row for each of S student tokens.

    ``first`` int64[S + 1] bounds the entries of each token. ``src`` int32 is a teacher token, counted from the first of
    its text, so that texts can be picked freely. The ``weight`` float32 of a token sum to one. The identity has no
    arrays.
    """

    tokens: int
    first: NDArray[np.int64] | None = None
    src: NDArray[np.int32] | None = None
    weight: NDArray[np.float32] | None = None

    @property
    def identical(self) -> bool:
        return self.first is None

    @property
    def covered(self) -> NDArray[np.bool_]:
        """Which student tokens have a target, bool[S]."""
        return np.ones(self.tokens, np.bool_) if self.first is None else self.first[1:] > self.first[:-1]

    def simplified(self, student: NDArray[np.int64], teacher: NDArray[np.int64]) -> PartAlignment:
        """The identity without arrays, if the alignment is the identity; else itself.

        Two tokenizers may differ only in words that no text of the part has. ``student`` and ``teacher`` are the
        offsets of the texts' tokens.
        """
        if self.first is None or self.src is None or self.weight is None or not np.array_equal(student, teacher):
            return self
        each_one = len(self.src) == self.tokens and np.array_equal(self.first, np.arange(self.tokens + 1))
        own = each_one and np.array_equal(self.src, local_places(student)) and bool((self.weight == 1).all())
        return PartAlignment(self.tokens) if own else self

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.first, self.src, self.weight) if array is not None)


def align(student: Tokens, teacher: Tokens, identical: bool = False) -> PartAlignment:
    """Align the tokens of two tokenizers for the same n texts. ``identical``: the tokens are known to be the same.

    Raises ValueError where the two do not hold the same number of texts.
    """
    if len(student.offsets) != len(teacher.offsets):
        raise ValueError(f"{len(student.offsets) - 1} texts of the student, {len(teacher.offsets) - 1} of the teacher")
    count = int(student.offsets[-1])
    if identical:
        return PartAlignment(count)
    student_text, teacher_text = _text_of(student), _text_of(teacher)
    pieces = (
        _overlaps(student, teacher, student_text, teacher_text),
        _roles(student, teacher, student_text, teacher_text),
    )
    dst, src, overlap = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    order = np.lexsort((src, dst))
    dst, src, overlap = dst[order], src[order], overlap[order]
    total = np.bincount(dst, weights=overlap, minlength=count)
    weight = (overlap / total[dst]).astype(np.float32)
    local = (src - teacher.offsets[:-1][teacher_text[src]]).astype(np.int32)
    return PartAlignment(count, _bounds(dst, count), local, weight)


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The concatenation of ``arange(start, start + length)`` over all pairs."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def local_places(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of every token in its own text, from the offsets of the texts."""
    lengths = np.diff(offsets)
    return ranges(np.zeros(len(lengths), np.int64), lengths)


def _text_of(tokens: Tokens) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(tokens.offsets) - 1), np.diff(tokens.offsets))


def _bounds(dst: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.bincount(dst, minlength=count))]).astype(np.int64)


def _overlaps(
    student: Tokens, teacher: Tokens, student_text: NDArray[np.int64], teacher_text: NDArray[np.int64]
) -> Pairs:
    """Pairs of text tokens that share characters of the same text and segment."""
    stride = 1 + max(int(tokens.ends.max(initial=0)) for tokens in (student, teacher))

    def on_the_line(tokens: Tokens, text: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        sound = (
            (tokens.starts >= 0) & (tokens.segments >= 0) & (tokens.segments <= 1)
        )  # or they would reach into other texts
        at = np.flatnonzero((tokens.roles == TEXT) & (tokens.ends > tokens.starts) & sound)
        origin = (text[at] * 2 + tokens.segments[at]) * stride
        return at, origin + tokens.starts[at], origin + tokens.ends[at]

    student_at, student_start, student_end = on_the_line(student, student_text)
    teacher_at, teacher_start, teacher_end = on_the_line(teacher, teacher_text)
    by_start = np.argsort(teacher_start, kind="stable")
    teacher_at, teacher_start, teacher_end = teacher_at[by_start], teacher_start[by_start], teacher_end[by_start]
    # teacher tokens before `low` end at the student token's start or earlier, those from `high` on begin at its end
    low = np.searchsorted(np.maximum.accumulate(teacher_end), student_start, side="right")
    high = np.searchsorted(teacher_start, student_end, side="left")
    found: list[Pairs] = []
    most, pairs = _PAIRS_PER_TOKEN * (len(student_at) + len(teacher_at)), 0
    for piece in _pieces(np.maximum(high - low, 0)):
        counts = np.maximum(high[piece] - low[piece], 0)
        row = np.repeat(np.arange(piece.start, piece.stop), counts)
        column = ranges(low[piece], counts)
        overlap = np.minimum(student_end[row], teacher_end[column]) - np.maximum(
            student_start[row], teacher_start[column]
        )
        real = overlap > 0
        pairs += int(real.sum())
        if pairs > most:
            raise DamageError(
                f"the tokens of a teacher overlap those of the student at least {pairs:,} times: no tokenizer gives "
                "such spans",
                "Find out what is damaged with: kdcache cache verify",
            )
        found.append((student_at[row[real]], teacher_at[column[real]], overlap[real].astype(np.float64)))
    return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))  # type: ignore[return-value]


def _roles(student: Tokens, teacher: Tokens, student_text: NDArray[np.int64], teacher_text: NDArray[np.int64]) -> Pairs:
    """Pairs of special tokens of the same text and role, each with the same weight."""
    student_at = np.flatnonzero(np.isin(student.roles, (FIRST, MIDDLE, LAST)))
    teacher_at = np.flatnonzero(np.isin(teacher.roles, (FIRST, MIDDLE, LAST)))
    roles = 1 + max(FIRST, MIDDLE, LAST)
    student_key = student_text[student_at] * roles + student.roles[student_at]
    teacher_key = teacher_text[teacher_at] * roles + teacher.roles[teacher_at]
    by_key = np.argsort(teacher_key, kind="stable")
    teacher_at, teacher_key = teacher_at[by_key], teacher_key[by_key]
    low = np.searchsorted(teacher_key, student_key, side="left")
    counts = np.searchsorted(teacher_key, student_key, side="right") - low
    return np.repeat(student_at, counts), teacher_at[ranges(low, counts)], np.ones(int(counts.sum()))


def _pieces(counts: NDArray[np.int64]) -> list[slice]:
    """Consecutive slices of the student tokens with a bounded number of candidates each; at least one slice."""
    upto = np.cumsum(counts)
    total = int(upto[-1]) if len(upto) else 0
    borders = np.searchsorted(upto, np.arange(_CANDIDATES_AT_ONCE, total, _CANDIDATES_AT_ONCE), side="right")
    edges = np.unique(np.concatenate([[0], borders, [len(counts)]]))
    if len(edges) == 1:
        return [slice(0, 0)]
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]


_FORMAT = 1  # raise it when encode or align gives another result for the same input
Arrays = dict[str, np.ndarray]
log = logging.getLogger(__name__)


class StudentTokens:
    """The tokens of one student, by its tokenizer and max_length; made once and kept on disk."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, directory: Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self._types = "token_type_ids" in tokenizer.model_input_names
        self._directory = (directory or home()) / "student" / f"{self.fingerprint[:16]}-{max_length}"

    def agrees_with(self, fingerprint: str, max_length: int, truncation: str) -> bool:
        """Whether a teacher with these settings has the same tokens as the student."""
        return (fingerprint, max_length, truncation) == (self.fingerprint, self.max_length, TRUNCATION)

    def encoded(
        self, text_ids: np.ndarray, texts: Callable[[], Sequence[tuple[str, ...]]], *, keep: bool = True
    ) -> EncodedTexts:
        """The tokens of a part's texts, whose ids are ``text_ids`` uint8[n, 16], read from disk if they were kept.

        ``texts`` is called only if they were not. ``keep=False``: some texts are placeholders, so nothing is written
        under their ids.
        """
        # 0.1.0 keeps its tokens under "tokens-": it fails on files with `truncated`, and both may share a directory
        path = self._path("texts", text_ids.tobytes(), json.dumps(self._types), _tokenizers_version())
        kept = load_arrays(path, {"input_ids", "offsets", "starts", "ends", "segments", "roles", "truncated"})
        if kept is None:
            encoded = encode(self.tokenizer, texts(), self.max_length)
            if keep:
                save_arrays(path, {name: array for name, array in vars(encoded).items() if array is not None})
            return encoded
        return EncodedTexts(**{"token_type_ids": None, **kept})  # type: ignore[arg-type]

    def aligned(
        self, text_ids: np.ndarray, student: EncodedTexts, teacher: Tokens, *, keep: bool = True
    ) -> PartAlignment:
        """The alignment of a part's texts with a teacher of another tokenizer; ``keep`` as in ``encoded``."""
        if not keep:
            return align(student_tokens(student), teacher)
        parts = (teacher.offsets, teacher.starts, teacher.ends, teacher.segments, teacher.roles)
        path = self._path("alignment", text_ids.tobytes(), _tokenizers_version(), *(array.tobytes() for array in parts))
        kept = load_arrays(path, {"first", "src", "weight"})
        if kept is None:
            made = align(student_tokens(student), teacher)
            assert made.first is not None and made.src is not None and made.weight is not None
            save_arrays(path, {"first": made.first, "src": made.src, "weight": made.weight})
            return made
        return PartAlignment(len(student.input_ids), **kept)

    def _path(self, kind: str, *made_of: bytes | str) -> Path:
        digest = hashlib.sha256(f"{_FORMAT}\0{self.fingerprint}\0{self.max_length}\0{TRUNCATION}".encode())
        for piece in made_of:
            data = piece.encode() if isinstance(piece, str) else piece
            digest.update(len(data).to_bytes(8, "little") + data)
        return self._directory / f"{kind}-{digest.hexdigest()[:40]}.bin"


@functools.cache
def _tokenizers_version() -> str:
    return version("tokenizers")


def student_tokens(encoded: EncodedTexts) -> Tokens:
    """The spans of encoded texts, without their vocabulary."""
    return Tokens(
        offsets=encoded.offsets,
        starts=encoded.starts,
        ends=encoded.ends,
        segments=encoded.segments,
        roles=encoded.roles,
    )


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write 1-D arrays; a failure to write is logged once per process and otherwise ignored."""
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    fields = {name: [array.dtype.str, len(array)] for name, array in arrays.items()}
    header = json.dumps({"sha256": hashlib.sha256(body).hexdigest(), "arrays": fields})
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(header.encode() + b"\n" + body)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not _told:
            _told.append(str(error))
            log.warning(
                "student tokens and alignments cannot be kept under %s and are made anew in every run: %s",
                home(),
                error,
            )


_told: list[str] = []


def load_arrays(path: Path, required: set[str]) -> Arrays | None:
    """The arrays that ``save_arrays`` wrote; None if the file is absent, damaged or lacks one of ``required``."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    try:
        header: dict[str, Any] = json.loads(head)
        fields = {str(name): (_dtype(dtype), int(length)) for name, (dtype, length) in header["arrays"].items()}
        if any(length < 0 for _, length in fields.values()):
            return None
        if header["sha256"] != hashlib.sha256(body).hexdigest() or not required <= fields.keys():
            return None
        arrays: Arrays = {}
        start = 0
        for name, (dtype, length) in fields.items():
            arrays[name] = np.frombuffer(body, dtype, length, start)
            start += arrays[name].nbytes
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return arrays if start == len(body) else None


def _dtype(name: str) -> np.dtype[Any]:
    """A number of one, two, four or eight bytes, or a bool; nothing else that numpy would take as a dtype."""
    if not re.fullmatch(r"[<|][iuf][1248]|\|b1", name):
        raise ValueError(name)
    return np.dtype(name)
