"""Student tokens and alignments of whole parts, kept on disk, so that the second student or epoch does not make them again.

They lie under ``KDCACHE_HOME`` (``~/.cache/kdcache`` where it is not set) and not in the cache, which may be shared and
read-only. A file is found by a digest of everything it was made from: ids of the texts, tokenizer, max_length, and the teacher's
tokens themselves. So a changed cache or tokenizer never meets an old file, and everything here may be deleted at any time.
A file that is damaged, or a directory that cannot be written, costs time and nothing else.

Files appear whole, by a rename, but are not synced to the disk as those of a cache are: what a power cut tears is found by
its digest and made again, and a student's first epoch does not wait for a disk to sync.

The format is one line of JSON (arrays by name with dtype and length, sha256 of the rest), then the arrays' bytes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.tokens import Tokens
from kdcache.data.encoding import TRUNCATION, EncodedTexts, encode, tokenizer_fingerprint
from kdcache.distill.alignment import PartAlignment, align
from kdcache.runs import home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1  # to be raised whenever encode or align would give something else for the same input
Arrays = dict[str, np.ndarray]
log = logging.getLogger(__name__)


class StudentTokens:
    """The tokens of one student: a tokenizer, a max_length, and what was already made with them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, directory: Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self._types = "token_type_ids" in tokenizer.model_input_names
        self._directory = (directory or home()) / "student" / f"{self.fingerprint[:16]}-{max_length}"

    def agrees_with(self, fingerprint: str, max_length: int, truncation: str) -> bool:
        """Whether a teacher's tokens are the student's tokens."""
        return (fingerprint, max_length, truncation) == (self.fingerprint, self.max_length, TRUNCATION)

    def encoded(self, text_ids: np.ndarray, texts: Callable[[], Sequence[tuple[str, ...]]], *, keep: bool = True) -> EncodedTexts:
        """The texts of a part, whose ids are ``text_ids`` uint8[n, 16]; ``texts`` is called only where they are not kept.

        ``keep=False`` where some of the texts are stand-ins: then nothing is written under their ids.
        """
        path = self._path("tokens", text_ids.tobytes(), json.dumps(self._types), _tokenizers_version())
        kept = load_arrays(path, {"input_ids", "offsets", "starts", "ends", "segments", "roles", "truncated"})
        if kept is None:
            encoded = encode(self.tokenizer, texts(), self.max_length)
            if keep:
                save_arrays(path, {name: array for name, array in vars(encoded).items() if array is not None})
            return encoded
        return EncodedTexts(**{"token_type_ids": None, **kept})  # type: ignore[arg-type]

    def aligned(self, text_ids: np.ndarray, student: EncodedTexts, teacher: Tokens, *, keep: bool = True) -> PartAlignment:
        """The alignment of a part's texts with a teacher that cuts them otherwise; ``keep`` as above."""
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
        offsets=encoded.offsets, starts=encoded.starts, ends=encoded.ends, segments=encoded.segments, roles=encoded.roles
    )


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write 1-D arrays; a disk that does not take them is logged once per process and otherwise ignored."""
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
            log.warning("student tokens and alignments cannot be kept under %s and will be made again: %s", home(), error)


_told: list[str] = []


def load_arrays(path: Path, required: set[str]) -> Arrays | None:
    """What ``save_arrays`` wrote, or None where it is absent, damaged or lacks one of ``required``."""
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
    """A number of one, two, four or eight bytes; numpy's own names may be programs of their own."""
    if not re.fullmatch(r"[<|][iuf][1248]", name):
        raise ValueError(name)
    return np.dtype(name)
