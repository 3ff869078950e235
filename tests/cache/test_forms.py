"""Coded layers and layers per text: written, read, damaged; and decoded by somebody who has the specification alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from safetensors.numpy import load_file

from kdcache.cache.card import describe
from kdcache.cache.manifest import make_manifest
from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify
from kdcache.codecs.trellis import codebook_of
from kdcache.codecs.trellis.codebook import decode_rows
from kdcache.errors import DamageError, MismatchError
from kdcache.testing.caches import CODED, PER_TEXT, Plan, dump, made_basis, made_hidden, made_teacher, made_texts

TEACHERS = (made_teacher("bert", {2: CODED, **PER_TEXT}), made_teacher("roberta", PER_TEXT))


@pytest.fixture
def plan() -> Plan:
    return Plan(made_texts(10, "train"), made_texts(3, "test"), TEACHERS)


def test_every_form_is_read_back(tmp_path: Path, plan: Plan) -> None:
    dump(tmp_path, plan)
    cache = open_cache(tmp_path)
    assert cache.teachers["bert"].layers == TEACHERS[0].layers
    for spec in TEACHERS:
        for part in (part for part in cache.parts if part.scope == "full"):
            texts = cache.texts(part.name)
            for layer in spec.layers:
                made = made_hidden(spec, layer, texts)
                found = cache.hidden(spec.name, part.name, layer)
                np.testing.assert_array_equal(found.values, made.values)
                assert cache.row_count(spec.name, part.name, layer) == len(made.values)
        basis, made_one = cache.basis(spec.name, 3), made_basis(spec, 3)
        np.testing.assert_array_equal(basis.tables["levels"], made_one.tables["levels"])
    assert verify(tmp_path) == []
    assert describe(cache)["teachers"]["bert"]["layers"]["3"]["tokens"] == "pooled"
    assert dump(tmp_path, plan).identity == cache.identity


def test_no_tokens_are_stored_where_no_layer_needs_them(tmp_path: Path, plan: Plan) -> None:
    dump(tmp_path, plan)
    assert (tmp_path / "teachers/bert/tokens").is_dir()
    assert not (tmp_path / "teachers/roberta/tokens").exists()
    with pytest.raises(MismatchError, match="no tokens of teacher 'roberta'"):
        open_cache(tmp_path).tokens("roberta", "part-00000")


def test_a_layer_of_tokens_can_come_later(tmp_path: Path, plan: Plan) -> None:
    dump(tmp_path, plan)
    wider = replace(plan, teachers=(TEACHERS[0], replace(TEACHERS[1], layers={**PER_TEXT, 2: CODED})))
    dump(tmp_path, wider)
    assert open_cache(tmp_path).token_count("roberta", "part-00000") > 0
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({2: replace(CODED, bytes=3)}, "bytes of layer 2 2; now it is 3"),
        ({3: replace(PER_TEXT[3], tokens="first")}, "tokens of layer 3 'pooled'; now it is 'first'"),
    ],
)
def test_another_form_of_a_stored_layer_is_refused(tmp_path: Path, plan: Plan, layers: dict, named: str) -> None:  # type: ignore[type-arg]
    dump(tmp_path, plan)
    with pytest.raises(MismatchError, match=named):
        dump(tmp_path, replace(plan, teachers=(replace(TEACHERS[0], layers=layers),)))


@pytest.mark.parametrize("file", ["hidden/part-00001.zarr/layer-02/c/0/0", "basis/layer-02.safetensors"])
def test_a_flipped_bit_is_found_and_repaired(tmp_path: Path, plan: Plan, file: str) -> None:
    identity = dump(tmp_path, plan).identity
    path = tmp_path / "teachers/bert" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert [one.file for one in verify(tmp_path)] == [f"teachers/bert/{file}"]
    with pytest.raises(DamageError, match=r"sha256|crc32c"):
        cache = open_cache(tmp_path)
        cache.basis("bert", 2)
        cache.hidden("bert", "part-00001", 2)
    assert dump(tmp_path, plan, repair=True).identity == identity
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (replace(CODED, bytes=0), "layer 2 lacks bytes, which a layer in coded needs"),
        (replace(CODED, dtype="int8"), "layer 2 has bytes, which do not belong to int8"),
        (replace(CODED, dim=5), "its projection and dim are not those"),
        (replace(CODED, projection="random"), "its projection and dim are not those"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, plan: Plan, layer: object, said: str) -> None:
    contents = dump(tmp_path, plan).contents
    contents.teachers["bert"] = replace(contents.teachers["bert"], layers={**TEACHERS[0].layers, 2: layer})  # type: ignore[dict-item]
    with pytest.raises(DamageError, match=said):
        make_manifest(contents, {})


def test_a_decoder_can_be_written_from_the_specification(tmp_path: Path, plan: Plan) -> None:
    """With zarr, safetensors and numpy; the library's own decoder is asked at the end only."""
    dump(tmp_path, plan)
    home = tmp_path / "teachers/bert"
    layer = json.loads((tmp_path / "manifest.json").read_text())["teachers"]["bert"]["layers"]["2"]
    assert layer == {"projection": "pca", "dim": 6, "dtype": "coded", "bytes": 2}
    rows = zarr.open(str(home / "hidden/part-00000.zarr"), mode="r")["layer-02"][...]
    basis = load_file(home / "basis/layer-02.safetensors")
    bits, window = basis["bits"].astype(int), int(basis["window"][0])
    tables, start = {}, 0
    for depth in sorted(set(bits.tolist())):
        size = 2 ** max(window, depth)
        tables[depth] = basis["levels"][start : start + size]
        start += size
    before = np.zeros((len(rows), 8), int)  # zeros stand before a row
    string = np.hstack([before, np.unpackbits(rows, axis=1)])
    values, end = np.empty((len(rows), len(bits))), 8
    for place, depth in enumerate(bits.tolist()):
        end += depth
        width = max(window, depth)
        number = string[:, end - width : end] @ (1 << np.arange(width)[::-1])
        values[:, place] = basis["scale"][place] * tables[depth][number]
    codebook = codebook_of(open_cache(tmp_path).basis("bert", 2))
    np.testing.assert_allclose(values, decode_rows(rows, codebook), rtol=1e-6)
