"""Caches of version 0.1.0: its files open and read as before, and the same dump writes the same bytes.

``fixtures/cache-0.1.0`` is what ``dump-teachers`` of 0.1.0 made of a tiny teacher, which lies beside it: every storage
format and every selection of tokens. ``fixtures/encoded-0.1.0.json`` has digests of what 0.1.0 stored of whole numbers
of eighths.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.cache.manifest import Manifest, read_manifest
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.spec import Fingerprints, TargetSpec, TeacherSpec
from kdcache.cache.verify import verify
from kdcache.codecs.base import Basis, LayerSpec, TokenSelection
from kdcache.codecs.registry import format_of
from kdcache.data.encoding import EncodedTexts
from kdcache.dump.audit import audit
from kdcache.dump.engine import TextBatches, run_part
from kdcache.dump.stage import DumpReport, dump_teachers
from kdcache.progress import SilentProgress
from kdcache.recipe import load_recipe
from kdcache.teachers.backends import TeacherOutput
from kdcache.testing.caches import read_everything

FIXTURES = Path(__file__).parent.parent / "fixtures"
IDENTITY = "661ea720d6741dd923cb0be4d91f3acddd81df44a0615453b80a2725d33b50d3"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Recipe, data, teacher and cache, to be written to."""
    shutil.copytree(FIXTURES / "cache-0.1.0", tmp_path / "old")
    return tmp_path / "old"


def dumped(home: Path, cache: Path, *, repair: bool = False) -> DumpReport:
    recipe = load_recipe(home / "recipe.toml")
    return dump_teachers(recipe, home / "teachers", cache, progress=SilentProgress(), repair=repair)


def test_it_opens_and_every_byte_is_read(old: Path) -> None:
    cache = open_cache(old / "cache")
    assert cache.identity == IDENTITY
    assert {(spec.dtype, spec.tokens) for spec in cache.teachers["bert"].layers.values()} >= {
        ("float32", "all"), ("float16", "first"), ("int8", "all"), ("coded", "all"), ("coded", "pooled"),
    }  # fmt: skip
    read_everything(cache)
    assert verify(old / "cache") == []
    assert audit(cache, old / "teachers", rows=12, progress=SilentProgress()).findings == []


def test_the_same_command_finds_nothing_to_do(old: Path) -> None:
    assert dumped(old, old / "cache").runs == ()
    assert read_manifest(old / "cache").identity == IDENTITY


def test_a_lost_part_is_made_again_on_the_stored_bases(old: Path) -> None:
    manifest = read_manifest(old / "cache")
    lost = "teachers/bert/hidden/part-00000.zarr"
    shutil.rmtree(old / "cache" / lost)
    dumped(old, old / "cache", repair=True)
    same_cache(manifest, open_cache(old / "cache"), open_cache(FIXTURES / "cache-0.1.0/cache"))


def test_the_same_dump_makes_the_same_cache(old: Path, tmp_path: Path) -> None:
    dumped(old, tmp_path / "new")
    same_cache(read_manifest(old / "cache"), open_cache(tmp_path / "new"), open_cache(old / "cache"))


def same_cache(manifest: Manifest, new: Cache, old: Cache) -> None:
    """Byte for byte; where this machine's forward passes round otherwise, the same within that, in the same files."""
    assert new.manifest.contents.teachers == old.manifest.contents.teachers
    found, known = new.manifest.contents.files, manifest.contents.files
    assert found.keys() == known.keys()
    assert {path: file.size for path, file in found.items()} == {path: file.size for path, file in known.items()}
    rounded = {path for path in known if found[path] != known[path]}
    if not rounded:
        assert new.identity == old.identity == IDENTITY
        return
    assert all(("/hidden/" in path and "/c/" in path) or "/outputs/" in path or "/basis/" in path for path in rounded)
    for layer, spec in old.teachers["bert"].layers.items():
        for part in ("part-00000", "part-00001"):
            one, other = (
                format_of(spec).decode(cache.hidden("bert", part, layer), cache.basis("bert", layer))
                for cache in (new, old)
            )
            assert np.square(one - other).mean() <= 1e-3 * np.square(other).mean()


def test_encoding_gives_the_same_bytes_on_any_machine() -> None:
    """Whole numbers of eighths on an exact basis: no sum is rounded, so nothing depends on the order of additions."""
    assert encoded() == json.loads((FIXTURES / "encoded-0.1.0.json").read_text())


WIDTH = 16
LENGTHS = np.array([4, 1, 8, 2, 4, 16, 1, 2])  # powers of two, so that means are exact too
FORMS = {
    "float32 none": LayerSpec("none", WIDTH, "float32"),
    "float32 pca 6": LayerSpec("pca", 6, "float32"),
    "float16 pca 6": LayerSpec("pca", 6, "float16"),
    "int8 none": LayerSpec("none", WIDTH, "int8"),
    "int8 random 8": LayerSpec("random", 8, "int8"),
    "coded 4": LayerSpec("pca", WIDTH, "coded", 4),
}


def rows_of(seed: int, count: int, width: int, low: int, high: int) -> np.ndarray:
    """Whole numbers that every machine draws alike."""
    raw = np.random.PCG64(seed).random_raw(count * width) >> np.uint64(33)
    return (raw % np.uint64(high - low + 1)).astype(np.int64).reshape(count, width) + low


def axes() -> np.ndarray:
    """Sixteen orthonormal rows of 1/4 and -1/4."""
    two = np.array([[1, 1], [1, -1]])
    return (np.kron(np.kron(two, two), np.kron(two, two)) / 4).astype(np.float32)


def mean() -> np.ndarray:
    return (rows_of(1, 1, WIDTH, -16, 16)[0] / 8).astype(np.float32)


def tables() -> dict[str, np.ndarray]:
    bits = np.array([5, 4, 4, 3, 3, 3, 2, 2, 2, 2, 1, 1], np.uint8)
    window = 6
    sizes = {int(depth): 1 << max(window, int(depth)) for depth in np.unique(bits)}
    levels = np.concatenate([rows_of(100 + depth, 1, size, -24, 24)[0] / 8 for depth, size in sizes.items()])
    scale = np.array([4, 4, 2, 2, 2, 1, 1, 1, 1, 1, 0.5, 0.5], np.float32)
    return {"bits": bits, "scale": scale, "window": np.array([window], np.uint8), "levels": levels.astype(np.float32)}


def basis(spec: LayerSpec) -> Basis:
    own = tables() if spec.bytes else {}
    if spec.projection == "none":
        return Basis(None, None, None, 1.0, 1.0)
    dim = len(own["bits"]) if own else spec.dim
    return Basis(axes()[:dim], mean(), np.ones(dim, np.float32), 1.0, 1.0, own)


class Numbers:
    """A backend that says the same of every text of so many tokens, in eighths: all that is done with it is exact."""

    device = "cpu"

    def run(self, inputs: dict[str, torch.Tensor], layers: Sequence[int], pooled: bool) -> TeacherOutput:  # noqa: ARG002
        ids = inputs["input_ids"][inputs["attention_mask"].bool()].numpy()
        hidden = {}
        for layer in layers:
            table = rows_of(1000 + layer, int(LENGTHS.sum()), WIDTH, -99, 99) / 8
            hidden[layer] = torch.from_numpy(table[ids].astype(np.float32))
        return TeacherOutput(torch.zeros(len(inputs["input_ids"]), 2), None, hidden)


def exact_texts() -> TextBatches:
    """Texts of ``LENGTHS`` tokens, no two of them alike, in three batches."""
    total = int(LENGTHS.sum())
    small = np.zeros(total, np.int8)
    texts = EncodedTexts(
        input_ids=np.arange(total, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(LENGTHS)]),
        starts=small.astype(np.int32),
        ends=small.astype(np.int32),
        segments=small,
        roles=small,
        token_type_ids=None,
    )
    return TextBatches(texts, np.zeros((len(LENGTHS), 16), np.uint8), 0, 20, "exact")


def exact_teacher(layers: dict[int, LayerSpec]) -> TeacherSpec:
    return TeacherSpec(
        "exact",
        "own",
        Fingerprints("", "", "", ""),
        len(layers),
        WIDTH,
        32,
        "longest_first",
        "torch",
        "float32",
        TargetSpec(shape=(2,)),
        None,
        8,
        layers,
    )


def encoded() -> dict[str, str]:
    found: dict[str, str] = {}
    selections: tuple[TokenSelection, ...] = ("all", "first", "pooled")
    for tokens in selections:
        layers = {number: replace(form, tokens=tokens) for number, form in enumerate(FORMS.values())}
        bases = {layer: basis(spec) for layer, spec in layers.items()}
        _, hidden = run_part(exact_texts(), Numbers(), exact_teacher(layers), tuple(layers), bases, lambda _: None)
        for form, block in zip(FORMS, hidden.values(), strict=True):
            for name, array in (("values", block.values), ("scales", block.scales)):
                if array is not None:
                    digest = hashlib.sha256(array.tobytes()).hexdigest()
                    found[f"{form}, {tokens}, {name}"] = f"{array.dtype}{list(array.shape)} {digest}"
    return found
