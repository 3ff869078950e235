"""Texts to tokens with character spans and roles, and tokens to padded batches.

Teachers and students use the same ``encode``: a cached teacher gets the same inputs as a live one, and the spans of two
tokenizers can be aligned. Only fast tokenizers work, because slow ones give no spans. The tokenizers library is called
directly: the dictionaries that transformers builds cost more than the tokenisation. Padding happens only in ``pad``, so
a batch is as long as its longest text.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.tokens import FIRST, LAST, MIDDLE, OTHER, TEXT, Tokens
from kdcache.data.custom_code import code_not_run, wants_code
from kdcache.errors import ModelError, RecipeError
from kdcache.progress import counted, format_share

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TRUNCATION = "longest_first"  # from the right; part of a cache's identity
_CHUNK = 4096  # texts whose Encoding objects exist at once
_COUNTED = 1 << 16  # texts that are encoded together to be counted
_PER_TOKEN = ("input_ids", "starts", "ends", "segments", "roles", "token_type_ids")  # arrays of EncodedTexts
_truncating = threading.Lock()  # truncation is state of a tokenizer: set, used and restored under this lock


@dataclass(frozen=True)
class EncodedTexts:
    """``n`` texts as ``T`` packed tokens, without padding; text ``i`` is ``offsets[i]:offsets[i + 1]``.

    ``starts`` and ``ends`` are the span of a token in code points of its column, as the tokenizer gives it: 0:0 for
    special tokens, of width zero for single spaces of byte-level BPE. ``segments`` is the column (0 or 1), -1 for
    special tokens. ``token_type_ids`` is None if the model takes none.
    """

    input_ids: np.ndarray  # int32[T]
    offsets: np.ndarray  # int64[n + 1]
    starts: np.ndarray  # int32[T]
    ends: np.ndarray  # int32[T]
    segments: np.ndarray  # int8[T]
    roles: np.ndarray  # int8[T], of kdcache.cache.tokens
    token_type_ids: np.ndarray | None  # int8[T]
    truncated: np.ndarray | None = None  # bool[n]; None if unknown

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> Tokens:
        """The spans and roles that a cache stores and alignment needs."""
        return Tokens(self.offsets, self.starts, self.ends, self.segments, self.roles)

    @property
    def lengths(self) -> np.ndarray:
        """int64[n], tokens per text."""
        return np.diff(self.offsets)

    @property
    def truncated_count(self) -> int:
        """Number of truncated texts; 0 if unknown."""
        return 0 if self.truncated is None else int(self.truncated.sum())

    def select(self, rows: Sequence[int] | np.ndarray) -> EncodedTexts:
        """The texts at ``rows``, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        places = self._places(rows)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64)
        selected: dict[str, Any] = {name: values[places] for name, values in self._per_token().items()}
        return replace(
            self, offsets=offsets, truncated=None if self.truncated is None else self.truncated[rows], **selected
        )

    def _per_token(self) -> dict[str, np.ndarray]:
        return {name: values for name in _PER_TOKEN if (values := getattr(self, name)) is not None}

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """Places int64 of the tokens of ``rows``, row after row."""
        lengths = self.lengths[rows]
        shifts = self.offsets[rows] - np.concatenate([[0], np.cumsum(lengths)[:-1]])
        places: np.ndarray = np.arange(lengths.sum()) + np.repeat(shifts, lengths)
        return places


def load_tokenizer(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model directory or hub name.

    Raises RecipeError if there is none, ModelError if it is a slow one or needs code that may not run.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    looked_at = Path(model).expanduser().absolute()
    where = f"the directory '{looked_at}'" if looked_at.is_dir() else f"'{model}' (there is no directory '{looked_at}')"
    hint = "Give a directory with tokenizer.json, or a hub name that is in reach or already downloaded."
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError, JSON errors …
        if wants_code(error):
            raise code_not_run(model) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecipeError(f"no tokenizer could be loaded from {where}: {reason}", hint) from error
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if len(words) < 2:  # transformers 5 makes an empty tokenizer of a config alone; T5's has one word
        raise RecipeError(f"no tokenizer could be loaded from {where}: it holds a model, but no tokenizer files", hint)
    require_fast(tokenizer)
    return tokenizer


def require_fast(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The ``tokenizers.Tokenizer`` of a fast tokenizer; ModelError for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__} of '{tokenizer.name_or_path}' is a slow one: it gives no character "
            "spans",
            "Convert it to tokenizer.json once, with transformers.convert_slow_tokenizer.",
        )
    return backend


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]], max_length: int) -> EncodedTexts:
    """Tokens of texts of one or two columns each, truncated to ``max_length`` tokens with special ones.

    Pairs lose tokens of the longer column first, from the right. A column may be empty. A text for which the tokenizer
    gives no token becomes one special token. Raises ModelError if ``max_length`` leaves no room for text.
    """
    backend = require_fast(tokenizer)
    columns = len(texts[0]) if texts else 1
    if columns not in (1, 2) or any(len(text) != columns for text in texts):
        raise ModelError(f"texts of one or two columns can be encoded, all alike; the first one here has {columns}")
    _check_max_length(tokenizer, backend, max_length, pair=columns == 2)
    with_types = "token_type_ids" in tokenizer.model_input_names
    chunks = []
    with _truncated(backend, max_length):  # also for the probe: some tokenizers are saved with padding enabled
        roles = _special_roles(backend, pair=columns == 2)
        for first in range(0, max(1, len(texts)), _CHUNK):  # one chunk without texts too
            chunk = texts[first : first + _CHUNK]
            encodings = backend.encode_batch([text[0] for text in chunk] if columns == 1 else list(chunk))
            cut = [len(encoding) == max_length and bool(encoding.overflowing) for encoding in encodings]
            truncated = np.array(cut, dtype=np.bool_)
            if not all(len(encoding) for encoding in encodings):
                stand_in = _stand_in(tokenizer)
                encodings = [encoding if len(encoding) else stand_in for encoding in encodings]
            chunks.append(_pack(encodings, roles, truncated, with_types=with_types))
    return _joined(chunks)


def count_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]], max_length: int
) -> tuple[int, int]:
    """How many tokens ``encode`` gives for all texts, and how many of them it truncates; nothing is kept."""
    tokens = truncated = 0
    for first in range(0, len(texts), _COUNTED):
        encoded = encode(tokenizer, texts[first : first + _COUNTED], max_length)
        tokens, truncated = tokens + int(encoded.lengths.sum()), truncated + encoded.truncated_count
    return tokens, truncated


@dataclass(frozen=True)
class _StandIn:
    """One special token for a text without tokens, with the fields of the library's Encoding."""

    ids: list[int]
    offsets: tuple[tuple[int, int], ...] = ((0, 0),)
    sequence_ids: tuple[None, ...] = (None,)
    type_ids: tuple[int, ...] = (0,)


def _stand_in(tokenizer: PreTrainedTokenizerBase) -> _StandIn:
    for name in ("eos_token_id", "bos_token_id", "unk_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        if token is not None:
            return _StandIn([int(token)])
    raise ModelError(
        f"tokenizer '{tokenizer.name_or_path}' gives no token for a text, and has no special token to use instead",
        "Remove rows without visible characters, or set eos_token in its tokenizer_config.json.",
    )


def truncation_note(reader: str, truncated: int, texts: int, max_length: int) -> list[str]:
    """One line if some of ``texts`` are truncated, else none.

    ``teacher 'bert': 31.4% of 6,920 texts have more than 128 tokens and are cut (max_length)``
    """
    if not truncated:
        return []
    return [
        f"{reader}: {format_share(truncated / texts)} of {counted(texts, 'text')} have more than {max_length} tokens "
        "and are cut (max_length)"
    ]


def _check_max_length(tokenizer: PreTrainedTokenizerBase, backend: Any, max_length: int, *, pair: bool) -> None:
    special = backend.num_special_tokens_to_add(pair)
    least = special + (2 if pair else 1)
    if not least <= max_length < 2**31:
        raise ModelError(
            f"max_length {max_length} does not fit tokenizer '{tokenizer.name_or_path}': it adds {special} special "
            f"tokens, so at least {least} are needed, and no more than {2**31 - 1} are possible",
            "Set max_length in [data], or in the section of that model, to what the model can take, e.g. 128.",
        )


@contextmanager
def _truncated(backend: Any, max_length: int) -> Iterator[None]:
    with _truncating:
        truncation, padding = backend.truncation, backend.padding
        backend.no_padding()
        backend.enable_truncation(max_length, strategy=TRUNCATION, direction="right")
        try:
            yield
        finally:
            if truncation is None:
                backend.no_truncation()
            else:
                backend.enable_truncation(**truncation)
            if padding is not None:
                backend.enable_padding(**padding)


def _special_roles(backend: Any, *, pair: bool) -> np.ndarray:
    """Roles of the special tokens of a text, in order; they are the same for every text, so one probe is enough.

    A first token before the text is FIRST, tokens between the columns are MIDDLE, the first token after the text is
    LAST. Others are OTHER (language codes, or the final [CLS] of XLNet).
    """
    probe = backend.encode("a", "a" if pair else None)
    sequence = [-1 if segment is None else segment for segment in probe.sequence_ids]
    text = [place for place, segment in enumerate(sequence) if segment >= 0]
    special = [place for place, segment in enumerate(sequence) if segment < 0]
    if len(set(sequence) - {-1}) < (2 if pair else 1):  # "a" is unknown to the tokenizer: use the order alone
        order = len(special)
        return np.array([FIRST, *[MIDDLE] * (order - 2), LAST][:order], dtype=np.int8)
    after = [place for place in special if place > text[-1]]
    roles = []
    for place in special:
        if place == 0:
            roles.append(FIRST)
        elif text[0] < place < text[-1]:
            roles.append(MIDDLE)
        else:
            roles.append(LAST if after and place == after[0] else OTHER)
    return np.array(roles, dtype=np.int8)


def _pack(
    encodings: Sequence[Any], special_roles: np.ndarray, truncated: np.ndarray, *, with_types: bool
) -> EncodedTexts:
    def flat(values: Sequence[Sequence[int]], dtype: type) -> np.ndarray:
        return np.fromiter(chain.from_iterable(values), dtype=dtype, count=total)

    ids = [encoding.ids for encoding in encodings]
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    total = int(lengths.sum())
    spans = np.array(list(chain.from_iterable(encoding.offsets for encoding in encodings)), dtype=np.int32).reshape(
        total, 2
    )
    sequence = chain.from_iterable(encoding.sequence_ids for encoding in encodings)
    segments = np.fromiter((-1 if segment is None else segment for segment in sequence), dtype=np.int8, count=total)
    roles = np.full(total, TEXT, dtype=np.int8)
    special = segments < 0
    if not len(special_roles):
        roles[special] = OTHER  # stand-ins
    elif special.sum() != len(special_roles) * len(encodings):
        raise ModelError(
            f"the tokenizer adds {len(special_roles)} special tokens to some texts and not to others; roles need one "
            "pattern"
        )
    else:
        roles[special] = np.tile(special_roles, len(encodings))
    types = flat([encoding.type_ids for encoding in encodings], np.int8) if with_types else None
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    starts, ends = np.ascontiguousarray(spans[:, 0]), np.ascontiguousarray(spans[:, 1])
    return EncodedTexts(flat(ids, np.int32), offsets, starts, ends, segments, roles, types, truncated)


def _joined(chunks: Sequence[EncodedTexts]) -> EncodedTexts:
    lengths = np.concatenate([chunk.lengths for chunk in chunks])
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(chunk, name) for chunk in chunks])
        for name in (*chunks[0]._per_token(), "truncated")
    }
    return replace(chunks[0], offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), **joined)


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """The canonical ``tokenizer.json``, without truncation and padding, which are state."""
    document = json.loads(require_fast(tokenizer).to_str())
    document["truncation"] = document["padding"] = None
    return json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex sha256 of ``tokenizer_json``: tokenizers with the same one give the same tokens for every text."""
    return hashlib.sha256(tokenizer_json(tokenizer).encode("utf-8", "surrogatepass")).hexdigest()


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id for padding, which is never attended to: the padding token, else the end of text, else 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def pad(encoded: EncodedTexts, rows: Sequence[int] | np.ndarray, pad_token_id: int) -> dict[str, torch.Tensor]:
    """The texts at ``rows`` as model inputs int64 [batch, longest of rows], always padded on the right.

    ``kdcache.teachers.network`` moves the padding for models that need it on the left. Keys: ``input_ids``,
    ``attention_mask`` and, if the tokenizer gives them, ``token_type_ids`` (padded with 0).
    """
    import torch

    rows = np.asarray(rows, dtype=np.int64)
    lengths = encoded.lengths[rows]
    places = encoded._places(rows)
    mask = np.arange(lengths.max(initial=0))[None, :] < lengths[:, None]

    def padded(values: np.ndarray, filler: int) -> torch.Tensor:
        table = np.full(mask.shape, filler, dtype=np.int64)
        table[mask] = values[places]
        return torch.from_numpy(table)

    batch = {
        "input_ids": padded(encoded.input_ids, pad_token_id),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }
    if encoded.token_type_ids is not None:
        batch["token_type_ids"] = padded(encoded.token_type_ids, 0)
    return batch


def token_budget_batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Batches of rows with at most ``tokens_per_batch`` padded tokens (rows x longest), or of one row.

    Rows are sorted by length (stable), longest first: a batch that does not fit into memory fails at the start.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, first = [], 0
    while first < len(order):
        rows = max(1, tokens_per_batch // max(1, int(lengths[order[first]])))
        batches.append(order[first : first + rows])
        first += rows
    return batches
