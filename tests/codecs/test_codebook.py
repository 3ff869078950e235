"""Rows of a coded layer: packing against bit strings written out, decoding against the specification read literally."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache.bases import BasisDamageError, check_basis, decode_basis, encode_basis
from kdcache.codecs.base import Basis, LayerSpec
from kdcache.codecs.trellis import codebook_of, tables_of
from kdcache.codecs.trellis.codebook import Codebook, check_codebook, decode_rows, pack_windows, table_sizes

DEPTHS = st.lists(st.integers(1, 8), min_size=1, max_size=12)


def made_codebook(depths: list[int], window: int, seed: int = 0) -> Codebook:
    bits = np.array(depths, np.uint8)
    generator = np.random.default_rng(seed)
    levels = generator.standard_normal(sum(table_sizes(bits, window).values())).astype(np.float32)
    return Codebook(bits, generator.random(len(depths)).astype(np.float32) + 0.5, window, levels)


def literal(row: bytes, codebook: Codebook) -> list[float]:
    """Value by value, from a string of zeros and ones."""
    text = "".join(f"{byte:08b}" for byte in row)
    values, end = [], 0
    for depth, scale in zip(codebook.bits.tolist(), codebook.scale.tolist(), strict=True):
        end += depth
        width = max(depth, codebook.window)
        values.append(float(codebook.tables[depth][int(("0" * width + text[:end])[-width:], 2)]) * scale)
    return values


@given(DEPTHS, st.integers(0, 8), st.integers(0, 3), st.data())
@settings(deadline=None, max_examples=150)
def test_rows_decode_as_the_specification_says(depths: list[int], window: int, spare: int, data: st.DataObject) -> None:
    codebook = made_codebook(depths, window)
    size = -(-sum(depths) // 8) + spare
    codes = np.array([[data.draw(st.integers(0, (1 << depth) - 1)) for depth in depths] for _ in range(3)])
    rows = pack_windows(codes.T.astype(np.uint8), codebook.bits, size)
    assert rows.shape == (3, size)
    for row, own in zip(rows, codes.tolist(), strict=True):
        text = "".join(f"{code:0{depth}b}" for code, depth in zip(own, depths, strict=True))
        assert "".join(f"{byte:08b}" for byte in row.tolist()) == text.ljust(8 * size, "0")
        assert decode_rows(row[None], codebook)[0].tolist() == pytest.approx(literal(row.tobytes(), codebook), rel=1e-6)


def test_no_rows() -> None:
    codebook = made_codebook([3, 2], 6)
    assert pack_windows(np.zeros((2, 0), np.uint8), codebook.bits, 4).shape == (0, 4)
    assert decode_rows(np.zeros((0, 4), np.uint8), codebook).shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": np.array([9, 1], np.uint8)}, "1 to 9 bits"),
        ({"bits": np.array([0, 1], np.uint8)}, "0 to 1 bits"),
        ({"bits": np.array([8, 8], np.uint8)}, "more than the 1 bytes"),
        ({"window": 9}, "window is 9"),
        ({"levels": np.zeros(3, np.float32)}, r"levels has shape \[3\]"),
        ({"scale": np.array([1.0, np.nan], np.float32)}, "not finite"),
        ({"scale": np.array([1.0, -1.0], np.float32)}, "negative"),
        ({"scale": np.ones(3, np.float32)}, "shapes"),
    ],
)
def test_a_codebook_that_cannot_be_is_refused(change: dict[str, object], said: str) -> None:
    good = made_codebook([3, 2], 4)
    check_codebook(good, 2, 1)
    with pytest.raises(ValueError, match=said):
        check_codebook(Codebook(**(vars(good) | change)), 2, 1)  # type: ignore[arg-type]


SPEC = LayerSpec("pca", 6, "coded", 1)


def coded_basis(depths: list[int] | None = None) -> Basis:
    codebook = made_codebook(depths or [3, 2, 1], 4)
    dim = len(codebook.bits)
    return Basis(
        np.eye(dim, 6, dtype=np.float32),
        np.zeros(6, np.float32),
        np.ones(dim, np.float32),
        2.0,
        1.5,
        tables_of(codebook),
    )


def test_a_basis_with_its_codebook_comes_back() -> None:
    basis = coded_basis()
    check_basis(basis, SPEC, 6)
    back = decode_basis(encode_basis(basis), SPEC, 6)
    assert back.tables.keys() == basis.tables.keys()
    for name, values in basis.tables.items():
        np.testing.assert_array_equal(back.tables[name], values)
    np.testing.assert_array_equal(back.components, basis.components)


def test_a_basis_must_be_the_one_of_its_layer() -> None:
    with pytest.raises(ValueError, match="needs a codebook"):
        check_basis(Basis(np.eye(6, dtype=np.float32), np.zeros(6, np.float32), None, 1.0, 1.0), SPEC, 6)
    with pytest.raises(ValueError, match="a layer in int8 has no tensors bits, levels, scale, window"):
        check_basis(coded_basis(), LayerSpec("pca", 3, "int8"), 6)
    with pytest.raises(ValueError, match="has 3 entries, expected 1 to 2"):
        check_basis(coded_basis(), LayerSpec("pca", 2, "coded", 1), 6)
    with pytest.raises(BasisDamageError, match="holds other tensors"):
        decode_basis(encode_basis(coded_basis()), LayerSpec("pca", 3, "int8"), 6)
    with pytest.raises(BasisDamageError, match=r"that is not (F32|U8)"):
        decode_basis(encode_basis(coded_basis()), LayerSpec("pca", 2, "coded", 1), 6)
    with pytest.raises(BasisDamageError, match="more than the 1 bytes"):
        decode_basis(encode_basis(coded_basis([4, 4, 4])), SPEC, 6)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_no_damage_of_a_coded_basis_gets_further_than_an_error(data: st.DataObject) -> None:
    """Where bytes were changed and the digest with them, as by somebody who means harm."""
    raw = bytearray(encode_basis(coded_basis()))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        basis = decode_basis(bytes(raw), SPEC, 6)
    except BasisDamageError:
        return
    codebook = codebook_of(basis)
    assert decode_rows(np.full((2, 1), 255, np.uint8), codebook).shape == (2, len(codebook.bits))
