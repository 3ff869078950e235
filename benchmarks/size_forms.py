"""The storage formats of hidden states, each made by the dump from the float32 cache, without running a teacher.

The dump gets hidden states from a backend, and this backend reads them from the float32 cache. So bases, codebooks and
rows are those of a dump with these settings. Product quantisation is not a format of caches: its decoded states are
stored at full width in float16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from coding import hidden_states, pick
from product import ProductQuantiser

from kdcache import open_cache
from kdcache.codecs.registry import format_of, storage_formats
from kdcache.data.encoding import encode
from kdcache.dump.fidelity import measure, through
from kdcache.dump.specs import PreparedTeacher, prepare_teachers, scopes
from kdcache.dump.stage import dump_teachers
from kdcache.loading.choice import target_dim
from kdcache.progress import RichProgress
from kdcache.teachers.backends import TeacherBackend, TeacherOutput
from kdcache.teachers.bundle import read_bundle

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.data.task import TaskData
    from kdcache.recipe import Recipe


@dataclass(frozen=True)
class Form:
    """How a layer is stored.

    A row in trellis has 1/``share`` of the bytes of float16 at full width; a row of product quantisation has
    1/``product`` of them.
    """

    dtype: str
    dim: int | None = None  # dimensions of PCA; None: full width
    share: int | None = None
    product: int | None = None

    def settings(self, width: int) -> dict[str, Any]:
        """The keys of a recipe's ``per_layer`` for a teacher of ``width``."""
        if self.share is not None:
            return {"projection": "pca", "dtype": self.dtype, "bytes": _share(width, self.share)}
        if self.dim is not None:
            return {"projection": "pca", "dim": min(self.dim, width), "dtype": self.dtype}
        return {"projection": "none", "dtype": self.dtype}


def _share(width: int, share: int) -> int:
    return max(1, 2 * width // share)


# the most informative formats come first, in case a run is stopped early
_TELLING = {
    "float16": Form("float16"),
    "trellis-8th": Form("trellis", share=8),
    "trellis-48th": Form("trellis", share=48),
    "trellis-16th": Form("trellis", share=16),
    "int8": Form("int8"),
    "pca-128": Form("int8", dim=128),
    "product-8th": Form("float16", product=8),
    "pca-32": Form("int8", dim=32),
    "float32": Form("float32"),
    "pca-256": Form("int8", dim=256),
}
FORMS: Mapping[str, Form] = _TELLING | {
    name: Form(name) for name, one in storage_formats().items() if not one.by_bytes and name not in _TELLING
}
EXACT = "float32"


def form_settings(form: Form, widths: Mapping[str, int]) -> list[str]:
    """Overrides of a recipe that store every layer of every teacher in this format."""
    made = ["dump.per_layer={}"]
    for name, width in widths.items():
        keys = ", ".join(f"{key} = {json.dumps(value)}" for key, value in form.settings(width).items())
        made.append(f"teachers.{name}.per_layer={{ all = {{ {keys} }} }}")
    return made


Rebuild = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Replay:
    """A backend that returns the outputs of a teacher from a cache, found by the tokens of a text.

    ``states``: per layer [tokens of the cache, width].
    """

    precision: str
    logits: np.ndarray
    pooled: np.ndarray | None
    states: Mapping[int, torch.Tensor]
    rows: Mapping[bytes, int]  # of a text's tokens
    tokens: Mapping[bytes, tuple[int, int]]  # of a text's tokens, where it has hidden states
    name: str = "torch"
    device: str = "cpu"
    record: Mapping[str, str] = field(default_factory=lambda: {"device": "replayed from a float32 cache"})

    def run(self, inputs: dict[str, torch.Tensor], layers: Sequence[int], pooled: bool) -> TeacherOutput:
        keys = [
            _key(ids[mask])
            for ids, mask in zip(inputs["input_ids"].numpy(), inputs["attention_mask"].bool().numpy(), strict=True)
        ]
        rows = [self.rows[key] for key in keys]
        hidden = {layer: torch.cat([self.states[layer][slice(*self.tokens[key])] for key in keys]) for layer in layers}
        vector = torch.from_numpy(self.pooled[rows]) if pooled and self.pooled is not None else None
        return TeacherOutput(torch.from_numpy(self.logits[rows]), vector, hidden)

    def close(self) -> None:
        """Nothing to free."""


def _key(ids: np.ndarray) -> bytes:
    return ids.astype(np.int32).tobytes()


def replay(exact: Cache, teacher: PreparedTeacher, rebuild: Mapping[int, Rebuild]) -> Replay:
    """All outputs of a teacher in ``exact``; layers in ``rebuild`` are encoded and decoded by it."""
    name, spec = teacher.name, exact.teachers[teacher.name]
    rows: dict[bytes, int] = {}
    tokens: dict[bytes, tuple[int, int]] = {}
    row, token = 0, 0
    for part in exact.parts:
        encoded = encode(teacher.tokenizer, exact.texts(part.name), spec.max_length)
        for first, last in zip(encoded.offsets[:-1].tolist(), encoded.offsets[1:].tolist(), strict=True):
            key = _key(encoded.input_ids[first:last])
            rows.setdefault(key, row)
            row += 1
            if part.scope == "full":
                tokens.setdefault(key, (token + first, token + last))
        token += int(encoded.offsets[-1]) if part.scope == "full" else 0
    outputs = [exact.outputs(name, part.name) for part in exact.parts]
    pooled = None if spec.pooled is None else np.concatenate([one.pooled for one in outputs if one.pooled is not None])
    states = {layer: full_states(exact, name, layer) for layer in teacher.spec.layers}
    states = {layer: rebuild[layer](whole) if layer in rebuild else whole for layer, whole in states.items()}
    return Replay(spec.precision, np.concatenate([one.logits for one in outputs]), pooled, states, rows, tokens)


def full_states(exact: Cache, teacher: str, layer: int, texts: int | None = None) -> torch.Tensor:
    """float32 [tokens, width] of the first ``texts`` full texts, or all."""
    found, left = [], texts
    for part in (part for part in exact.parts if part.scope == "full"):
        if left is None or left > 0:
            values = exact.hidden(teacher, part.name, layer).values
            count = (
                len(values) if left is None else int(exact.tokens(teacher, part.name).offsets[min(left, part.texts)])
            )
            found.append(torch.from_numpy(np.asarray(values[:count])))
            left = None if left is None else left - part.texts
    return torch.cat(found)


def quantisers(exact: Cache, recipe: Recipe, form: Form, teacher: str) -> dict[int, Rebuild]:
    """Quantisers by layer, trained on the texts that a dump fits bases on; empty if a cache has this format."""
    if form.product is None:
        return {}
    spec, sample = exact.teachers[teacher], recipe.dump.sample_texts
    size = _share(spec.width, form.product)
    return {
        layer: ProductQuantiser.trained(full_states(exact, teacher, layer, sample), size).rebuild
        for layer in spec.layers
    }


def store(
    recipe: Recipe, teachers_dir: Path, exact_dir: Path, form: Form, target: Path, unseen: Path
) -> dict[str, Any]:
    """Make the cache of ``form`` (``recipe`` has its settings) in ``target``; returns bytes and share kept by layer."""
    exact = open_cache(exact_dir)
    rebuild = {name: quantisers(exact, recipe, form, name) for name in exact.teachers}

    @contextmanager
    def opened(teacher: PreparedTeacher, _: Path) -> Iterator[TeacherBackend]:
        yield replay(exact, teacher, rebuild[teacher.name])

    opening: Callable[[PreparedTeacher, Path], AbstractContextManager[TeacherBackend]] = opened
    dump_teachers(recipe, teachers_dir, target, progress=RichProgress(), opener=opening)
    cache = open_cache(target)
    layers = [
        kept(
            cache, name, layer, form, rebuild[name].get(layer),
            torch.from_numpy(np.load(unseen / f"{name}-{layer}.npy")),
        )
        for name, spec in cache.teachers.items() for layer in spec.layers
    ]  # fmt: skip
    return {
        "layers": layers,
        "tokens": {
            name: sum(cache.token_count(name, part.name) for part in cache.parts if part.scope == "full")
            for name in cache.teachers
        },
    }


def kept(
    cache: Cache, name: str, layer: int, form: Form, rebuild: Rebuild | None, unseen: torch.Tensor
) -> dict[str, Any]:
    """Bytes per token of one layer, its stored dimensions, and the share kept of the variance of ``unseen``.

    ``unseen``: [tokens, width].
    """
    teacher = cache.teachers[name]
    spec = teacher.layers[layer]
    size = format_of(spec).row_bytes(spec) if form.product is None else _share(teacher.width, form.product)
    back = through(spec, cache.basis(name, layer), unseen if rebuild is None else rebuild(unseen))
    found = measure(spec, back, unseen)
    numbers = {
        "width": teacher.width,
        "dim": target_dim(cache, name, layer),
        "bytes": size,
        "kept": round(found.explained, 6),
    }
    return {"teacher": name, "layer": layer, **numbers}


def extract_unseen(recipe: Recipe, task: TaskData, teachers_dir: Path, texts: int, target: Path) -> None:
    """Hidden states of some test (else validation) texts; caches have no hidden states of them, so none are fitted."""
    others = scopes(task).logits_only
    split = task.splits["test" if "test" in task.splits else "validation"]
    there = [bytes(row) for row in split.text_ids]
    chosen = pick([task.texts[one] for one in dict.fromkeys(there) if one in others], texts)
    target.mkdir(parents=True, exist_ok=True)
    for teacher in prepare_teachers(recipe, read_bundle(teachers_dir), teachers_dir, len(task.label_names)):
        for layer, whole in hidden_states(teacher, chosen, teachers_dir).items():
            np.save(target / f"{teacher.name}-{layer}.npy", whole)


def widths(exact_dir: Path) -> dict[str, int]:
    return {name: spec.width for name, spec in open_cache(exact_dir).teachers.items()}
