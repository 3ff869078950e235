"""Small synthetic caches: no teacher runs, and every number is a function of the text, so dumps of a text are equal.

Teacher outputs are hashes. So tests of resuming, extending and repairing take milliseconds, and tests of readers can
compute every value of a cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.ids import id_array, id_list, text_id
from kdcache.cache.spec import Fingerprints, Settings, TargetSpec, TaskSpec, TeacherSpec, needs_tokens
from kdcache.cache.tokens import FIRST, LAST, TEXT, Outputs, Tokens
from kdcache.cache.writer import CacheWriter, open_writer
from kdcache.codecs.base import Basis, HiddenBlock, LayerSpec
from kdcache.codecs.registry import format_of
from kdcache.codecs.trellis import tables_of
from kdcache.codecs.trellis.codebook import Codebook, table_sizes

if TYPE_CHECKING:
    from kdcache.cache.manifest import Manifest
    from kdcache.cache.reader import Cache

TASK = TaskSpec(("sentence",), ("bad", "good"))
SETTINGS = Settings(seed=3, part_size=4)
CODED = LayerSpec("pca", 6, "coded", bytes=2)
PER_TEXT = {1: LayerSpec("pca", 3, "int8", tokens="first"), 3: LayerSpec("pca", 6, "coded", bytes=2, tokens="pooled")}
LAYERS = {2: LayerSpec("pca", 3, "int8"), 4: LayerSpec("none", 6, "float32")}

Texts = dict[bytes, tuple[str, ...]]


@dataclass(frozen=True)
class Plan:
    """The request for a synthetic dump."""

    train: Texts
    test: Texts
    teachers: tuple[TeacherSpec, ...]
    task: TaskSpec = TASK
    settings: Settings = SETTINGS
    store_text: bool = True


def made_texts(count: int, prefix: str = "text") -> Texts:
    """``count`` distinct texts of one to six words."""
    lines = [" ".join([f"{prefix} {index}", *["word"] * (index % 5)]) for index in range(count)]
    return {text_id((line,)): (line,) for line in lines}


def made_teacher(name: str = "bert", layers: Mapping[int, LayerSpec] | None = None, **fields: object) -> TeacherSpec:
    """A teacher of width 6 and depth 4."""
    print_ = hashlib.sha256(name.encode()).hexdigest()
    values: dict[str, object] = {
        "name": name, "head": "shared", "fingerprints": Fingerprints(print_, print_, print_, print_),
        "depth": 4, "width": 6,
        "max_length": 16, "truncation": "longest_first", "backend": "torch", "precision": "float32",
        "target": TargetSpec(shape=(2,)), "pooled": 5, "sample_texts": 8,
        "layers": LAYERS if layers is None else layers,
    }  # fmt: skip
    return TeacherSpec(**(values | fields))  # type: ignore[arg-type]


def made_plan(train: int = 10, test: int = 5, teachers: Sequence[str] = ("bert", "roberta")) -> Plan:
    """The usual small cache: 3 full parts, 2 parts with logits only, two teachers."""
    return Plan(made_texts(train, "train"), made_texts(test, "test"), tuple(made_teacher(name) for name in teachers))


def dump(path: Path, plan: Plan, *, repair: bool = False, provenance: Mapping[str, object] | None = None) -> Manifest:
    """Write the missing components of ``plan`` to the cache at ``path``, as a dump does."""
    with open_writer(path, plan.task, plan.settings, store_text=plan.store_text, repair=repair) as writer:
        writer.add_texts(plan.train, plan.test)
        for spec in plan.teachers:
            dump_teacher(writer, spec)
        for split, texts in (("train", plan.train), ("test", plan.test)):
            ids = id_array(texts)
            writer.write_examples(split, ids, np.arange(len(ids), dtype=np.int64) % 3 - 1, None)
        return writer.publish(provenance or {"command": "made up"}, card=lambda _: "# made up\n")


def dump_teacher(writer: CacheWriter, spec: TeacherSpec) -> None:
    """Write the missing components of one teacher."""
    missing = writer.declare_teacher(spec, tokenizer_json(spec.name))
    there = writer.bases(spec.name)
    writer.write_bases(
        spec.name, {layer: made_basis(spec, layer) for layer in sorted(spec.layers.keys() - there.keys())}
    )
    for task in missing:
        texts = writer.texts_of(task.part)
        full = task.part.scope == "full"
        writer.write_part(
            spec.name,
            task.part,
            outputs=made_outputs(spec, task.part.text_ids) if task.outputs else None,
            tokens=made_tokens(texts) if full and needs_tokens(spec.layers) else None,
            hidden={layer: made_hidden(spec, layer, texts) for layer in task.layers},
        )


def tokenizer_json(name: str) -> str:
    """A stand-in for a tokenizer."""
    return f'{{"model":"{name}"}}'


def made_outputs(spec: TeacherSpec, ids: np.ndarray) -> Outputs:
    """Logits and pooled vectors of texts, from their ids."""
    pooled = None if spec.pooled is None else _rows(f"{spec.name}/pooled", id_list(ids), spec.pooled)
    return Outputs(_rows(f"{spec.name}/logits", id_list(ids), spec.target.shape[0]), pooled)


def made_tokens(texts: Sequence[tuple[str, ...]]) -> Tokens:
    """One token per word between two special ones."""
    rows: list[tuple[int, int, int, int]] = []
    lengths = []
    for columns in texts:
        words = [row for segment, text in enumerate(columns) for row in _words(text, segment)]
        rows += [(0, 0, -1, FIRST), *words, (0, 0, -1, LAST)]
        lengths.append(len(words) + 2)
    table = np.array(rows, dtype=np.int32).reshape(-1, 4)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    starts, ends, segments, roles = (np.ascontiguousarray(column) for column in table.T)
    return Tokens(offsets, starts, ends, segments.astype(np.int8), roles.astype(np.int8))


def made_hidden(spec: TeacherSpec, layer: int, texts: Sequence[tuple[str, ...]]) -> HiddenBlock:
    """Hidden states of the tokens of texts: from text and token number, or from the text if there is one per text."""
    one = spec.layers[layer]
    counts = [1 if one.per_text else int(made_tokens([text]).offsets[-1]) for text in texts]
    keys = [text_id(text) + bytes([row]) for text, count in zip(texts, counts, strict=True) for row in range(count)]
    storage = format_of(one)
    if storage.by_bytes:
        codes = _rows(f"{spec.name}/{layer}", keys, one.bytes)
        return HiddenBlock(np.round(codes * 127.5 + 127.5).astype(np.uint8))
    values = _rows(f"{spec.name}/{layer}", keys, one.dim)
    if one.dtype == "int8":
        codes = np.clip(np.round(values * 127), -127, 127).astype(np.int8)
        return HiddenBlock(codes, np.full(len(keys), 1 / 127, dtype=np.float32))
    return storage.encode(values, one, made_basis(spec, layer))


def made_basis(spec: TeacherSpec, layer: int) -> Basis:
    """The first ``dim`` unit vectors; for trellis 4 of them, and a codebook of 5, 4, 3 and 1 bits, window 4."""
    one = spec.layers[layer]
    if format_of(one).by_bytes:
        bits = np.array([5, 4, 3, 1], dtype=np.uint8)
        levels = _rows(f"{spec.name}/{layer}/levels", [b""], sum(table_sizes(bits, 4).values()))[0]
        codebook = Codebook(bits, np.array([4.0, 2.0, 1.0, 0.5], np.float32), 4, levels)
        return Basis(
            np.eye(4, spec.width, dtype=np.float32),
            np.zeros(spec.width, np.float32),
            None,
            2.0,
            1.5,
            tables_of(codebook),
        )
    if one.projection == "none":
        return Basis(None, None, None, 2.0, 2.0)
    components = np.eye(one.dim, spec.width, dtype=np.float32)
    return Basis(components, np.zeros(spec.width, np.float32), np.ones(one.dim, np.float32), 2.0, 1.5)


def _words(text: str, segment: int) -> Iterator[tuple[int, int, int, int]]:
    position = 0
    for word in text.split(" "):
        yield position, position + len(word), segment, TEXT
        position += len(word) + 1


def _rows(name: str, keys: Sequence[bytes], width: int) -> np.ndarray:
    """float32[n, width] in -1..1: each row is a hash of name and key."""
    data = b"".join(hashlib.shake_128(name.encode() + key).digest(width) for key in keys)
    return ((np.frombuffer(data, dtype=np.uint8).reshape(-1, width).astype(np.float32) - 127.5) / 127.5).astype(
        np.float32
    )


def read_everything(cache: Cache) -> None:
    """Every table and array of a cache, as verify, a student and a card read them."""
    for split in cache.splits:
        cache.examples(split)
    for part in cache.parts:
        cache.text_ids(part.name)
        cache.texts(part.name)
        for teacher, spec in cache.teachers.items():
            cache.tokenizer_json(teacher)
            cache.outputs(teacher, part.name)
            if part.scope == "full":
                if needs_tokens(spec.layers):
                    cache.tokens(teacher, part.name)
                for layer in spec.layers:
                    cache.hidden(teacher, part.name, layer)
                    cache.basis(teacher, layer)
