"""A cache in memory, with the methods that the loader needs, for tests of order, threads and errors.

Hidden states are a known function of (teacher, layer, text, token), so that a test can compute what a batch must hold.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.ids import ID_BYTES, IdIndex, id_array, text_id
from kdcache.cache.spec import Fingerprints, Settings, TargetSpec, TaskSpec, TeacherSpec
from kdcache.cache.tokens import Outputs
from kdcache.codecs.base import Basis, HiddenBlock, LayerSpec
from kdcache.codecs.registry import format_of
from kdcache.data.encoding import TRUNCATION, EncodedTexts, encode, tokenizer_fingerprint
from kdcache.loading.alignment import student_tokens

if TYPE_CHECKING:
    from kdcache.cache.tokens import Tokens

Text = tuple[str, ...]


def truth(teacher: str, layer: int, text: Text, tokens: int, dim: int) -> np.ndarray:
    """Hidden states of a text in a layer of the teacher: float32[tokens, dim]."""
    seed = hashlib.sha256(repr((teacher, layer, text)).encode()).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "little")).standard_normal((tokens, dim)).astype(np.float32)


def truth_logits(teacher: str, text: Text, classes: int) -> np.ndarray:
    """Logits float32[classes] of a text."""
    return truth(teacher, -1, text, 1, classes).reshape(-1)


@dataclass
class MemoryTeacher:
    """A teacher of a ``MemoryCache``: its tokenizer, and the width of each stored layer."""

    tokenizer: Any
    max_length: int = 64
    layers: Mapping[int, int] = field(default_factory=lambda: {2: 6, 4: 5})  # layer -> dim
    dtype: str = "float32"


@dataclass
class MemoryCache:
    """``parts``: texts per part; ``splits``: per split the texts (with repeats, in order) and labels."""

    part_texts: Sequence[Sequence[Text]]
    memory_teachers: Mapping[str, MemoryTeacher]
    split_rows: Mapping[str, Sequence[tuple[Text, int]]]
    scopes: Sequence[str] | None = None
    has_text: bool = True
    on_read: Callable[[str, int], None] = lambda _what, _part: None
    path: str = "memory"
    reads: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        scopes = self.scopes or ["full"] * len(self.part_texts)
        self.parts = tuple(
            SimpleNamespace(name=f"part-{index:05}", scope=scope, texts=len(texts))
            for index, (texts, scope) in enumerate(zip(self.part_texts, scopes, strict=True))
        )
        self.settings = Settings(0, max(len(texts) for texts in self.part_texts))
        self.task = TaskSpec(("text",), ("negative", "positive"))
        self.teachers = {name: self._spec(name, teacher) for name, teacher in self.memory_teachers.items()}
        self.splits = tuple(self.split_rows)
        self._ids = [id_array([text_id(text) for text in texts]) for texts in self.part_texts]
        self._index = IdIndex(np.concatenate(self._ids))

    def _spec(self, name: str, teacher: MemoryTeacher) -> TeacherSpec:
        layers = {layer: LayerSpec("none", dim, teacher.dtype) for layer, dim in teacher.layers.items()}
        prints = Fingerprints("w", "c", "h", tokenizer_fingerprint(teacher.tokenizer))
        return TeacherSpec(
            name, "shared", prints, 4, 8, teacher.max_length, TRUNCATION, "torch", "float32",
            TargetSpec(shape=(2,)), None, 0, layers,
        )  # fmt: skip

    def _at(self, part: str) -> int:
        return [one.name for one in self.parts].index(part)

    def _read(self, what: str, part: str) -> int:
        index = self._at(part)
        self.reads[what, index] += 1
        self.on_read(what, index)
        return index

    def examples(self, split: str) -> Any:
        rows = self.split_rows[split]
        return SimpleNamespace(
            text_ids=id_array([text_id(text) for text, _ in rows]),
            labels=np.array([label for _, label in rows]),
            groups=None,
        )

    def example_count(self, split: str) -> int:
        return len(self.split_rows[split])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self._index.find(ids)
        starts = np.concatenate([[0], np.cumsum([len(part) for part in self._ids])])
        part = np.where(found < 0, -1, np.searchsorted(starts, found, side="right") - 1).astype(np.int32)
        return part, np.where(found < 0, -1, found - starts[np.maximum(part, 0)])

    def locate_blocks(self, blocks: Callable[[], Iterable[np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.concatenate([np.zeros((0, ID_BYTES), np.uint8), *blocks()])
        assert len(ids) == count
        return self.locate(ids)

    def text_ids(self, part: str) -> np.ndarray:
        return self._ids[self._at(part)]

    def texts(self, part: str) -> Sequence[Text]:
        return self.part_texts[self._read("texts", part)]

    def encoded(self, teacher: str, part: str) -> EncodedTexts:
        spec = self.memory_teachers[teacher]
        return encode(spec.tokenizer, list(self.part_texts[self._at(part)]), spec.max_length)

    def check_present(self, paths: list[str]) -> None:
        """All files are always present."""
        assert all(isinstance(path, str) for path in paths)

    def expect(self, paths: Sequence[str]) -> None:
        """No file has to be fetched."""

    def token_count(self, teacher: str, part: str) -> int:
        return int(self.encoded(teacher, part).offsets[-1])

    def row_count(self, teacher: str, part: str, layer: int) -> int:
        """A row per token: no layer here is per text."""
        assert layer in self.teachers[teacher].layers
        return self.token_count(teacher, part)

    def outputs(self, teacher: str, part: str) -> Outputs:
        texts = self.part_texts[self._read(f"outputs {teacher}", part)]
        return Outputs(np.stack([truth_logits(teacher, text, 2) for text in texts]))

    def tokens(self, teacher: str, part: str) -> Tokens:
        self._read(f"tokens {teacher}", part)
        return student_tokens(self.encoded(teacher, part))

    def hidden(self, teacher: str, part: str, layer: int, into: HiddenBlock | None = None) -> HiddenBlock:
        texts = self.part_texts[self._read(f"hidden {teacher} {layer}", part)]
        lengths = self.encoded(teacher, part).lengths.tolist()
        spec = self.teachers[teacher].layers[layer]
        values = np.concatenate(
            [truth(teacher, layer, text, length, spec.dim) for text, length in zip(texts, lengths, strict=True)]
        )
        block = format_of(spec).encode(values, spec, self.basis(teacher, layer))
        if into is not None:
            into.put(np.arange(len(block)), block)
        return block

    def basis(self, teacher: str, layer: int) -> Basis:
        assert layer in self.teachers[teacher].layers
        return Basis(None, None, None, 1.0, 0.5 + layer)
