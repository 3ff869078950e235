"""Rows of a cache as a live teacher sees them now: which are looked at, and what the teacher gives for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdcache.codecs.selection import select_tokens
from kdcache.data.encoding import EncodedTexts, encode, padding_id
from kdcache.dump.engine import TextBatches

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.cache.spec import TeacherSpec
    from kdcache.cache.tokens import Tokens
    from kdcache.codecs.base import TokenSelection
    from kdcache.teachers.backends import TeacherBackend
    from kdcache.teachers.teacher import Teacher

TOKENS_PER_BATCH = 4096
_PARTS = 8  # that rows are drawn from, at most: a part's layer is read whole


@dataclass(frozen=True)
class PartRows:
    """Rows of one part, ascending, with their ids and texts."""

    part: str
    full: bool
    rows: np.ndarray
    text_ids: np.ndarray
    texts: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.rows)


def choose_rows(cache: Cache, rows: int, seed: int) -> list[PartRows]:
    """Seeded rows of at most ``_PARTS`` parts, from each in proportion to its texts."""
    parts = [cache.parts[place] for place in np.sort(_shuffled(len(cache.parts), seed)[:_PARTS]).tolist()]
    total = sum(part.texts for part in parts)
    chosen = []
    for number, part in enumerate(parts, start=1):
        count = min(part.texts, max(1, round(rows * part.texts / total)))
        places = np.sort(_shuffled(part.texts, seed + number)[:count])
        texts, ids = cache.texts(part.name), cache.text_ids(part.name)
        chosen.append(PartRows(part.name, part.scope == "full", places, ids[places], [texts[one] for one in places.tolist()]))
    return chosen


def _shuffled(count: int, seed: int) -> np.ndarray:
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


class LivePart:
    """The chosen rows of a part, encoded for one teacher and ready to be run."""

    def __init__(self, teacher: Teacher, spec: TeacherSpec, chosen: PartRows) -> None:
        self.spec, self.chosen = spec, chosen
        self.encoded: EncodedTexts = encode(teacher.tokenizer, chosen.texts, spec.max_length)
        self._pad = padding_id(teacher.tokenizer)

    def gather(
        self, backend: TeacherBackend, layers: Sequence[int], count: int | None = None, tokens_per_batch: int = TOKENS_PER_BATCH
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Logits [texts, classes] and packed hidden states [tokens, width] per layer, of the first ``count`` texts or all."""
        rows = np.arange(len(self.chosen))[:count]
        encoded = self.encoded.select(rows)
        batches = TextBatches(encoded, self.chosen.text_ids[rows], self._pad, tokens_per_batch, self.spec.name)
        logits = np.empty((len(rows), *self.spec.target.shape), np.float32)
        hidden = {layer: np.empty((int(encoded.offsets[-1]), self.spec.width), np.float32) for layer in layers}
        for places, output in batches.run(backend, tuple(layers)):
            logits[places] = output.logits.cpu().numpy()
            for layer, whole in hidden.items():
                whole[batches.token_places(places)] = output.hidden[layer].cpu().numpy()
        return logits, hidden

    def selected(self, hidden: np.ndarray, selection: TokenSelection) -> np.ndarray:
        """What a layer stored for ``selection`` holds of packed ``hidden`` [tokens, width]."""
        import torch

        found: np.ndarray = select_tokens(torch.from_numpy(hidden), self.encoded.lengths, selection).numpy()
        return found

    def wrong_tokens(self, stored: Tokens) -> list[int]:
        """Which of the rows have other spans, segments or roles in the cache than the tokenizer gives."""
        wrong = []
        for own, row in enumerate(self.chosen.rows.tolist()):
            here = slice(int(stored.offsets[row]), int(stored.offsets[row + 1]))
            now = slice(int(self.encoded.offsets[own]), int(self.encoded.offsets[own + 1]))
            columns = ("starts", "ends", "segments", "roles")
            if any(not np.array_equal(getattr(stored, one)[here], getattr(self.encoded, one)[now]) for one in columns):
                wrong.append(own)
        return wrong

    def token_places(self, stored: Tokens) -> tuple[np.ndarray, np.ndarray] | None:
        """For every token of the rows its text among them, and its place in the part; None where they have other lengths now."""
        lengths = stored.lengths[self.chosen.rows]
        if not np.array_equal(lengths, self.encoded.lengths):
            return None
        shifts = stored.offsets[self.chosen.rows] - self.encoded.offsets[:-1]
        return np.repeat(np.arange(len(lengths)), lengths), np.arange(int(lengths.sum())) + np.repeat(shifts, lengths)
