"""float8: the contract, every code, and rounding against torch's own e4m3 and against a plain search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.codecs.float8 import FLOAT8, VALUES
from kdcache.testing.codec_contract import CodecContract


class TestFloat8(CodecContract):
    storage = FLOAT8

    def test_a_missing_chunk_is_refused_by_its_codes(self) -> None:
        spec, _ = self.layer()
        for code in (127, 255):
            block = self.encoded(self.rows(3))
            block.values[2, 0] = code
            with pytest.raises(ValueError, match="127 or 255"):
                FLOAT8.check_block(block, spec, 3)
            assert np.isnan(self.decoded(block)[2, 0])

    @given(st.data())
    @settings(deadline=None, max_examples=100)
    def test_a_value_is_within_a_sixteenth_of_itself(self, data: st.DataObject) -> None:
        x = data.draw(self.matrices())
        block = self.encoded(x)
        assert block.scales is not None
        error = np.abs(self.decoded(block).astype(np.float64) - x)
        least = np.maximum(block.scales.astype(np.float64) / 1024, 448 * np.finfo(np.float32).smallest_normal)
        assert (error <= 1.0001 * np.maximum(np.abs(x.astype(np.float64)) / 16, least[:, None])).all()

    def test_it_keeps_more_than_int8_where_few_dimensions_are_large(self) -> None:
        x = self.rows(200) * np.array([300, 1, 1, 1, 1, 1], np.float32)
        spec, basis = self.layer()
        from kdcache.codecs.int8 import INT8

        small = [np.square(one.decode(one.encode(x, spec, basis), basis) - x)[:, 1:].mean() for one in (FLOAT8, INT8)]
        assert small[0] < small[1] / 10


def test_every_code_is_what_torch_says_it_is() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(VALUES, expected)
    assert np.flatnonzero(np.isnan(VALUES)).tolist() == [127, 255]
    assert np.nanmax(VALUES) == 448


def encoded_with_scale_one(numbers: np.ndarray) -> np.ndarray:
    """Codes of ``numbers`` in -448..448: a column of 448 makes the scale 1."""
    x = np.column_stack([numbers, np.full(len(numbers), 448)]).astype(np.float32)
    block = FLOAT8.encode(x, *TestFloat8().layer())
    assert block.scales is not None and (block.scales == 1).all()
    codes: np.ndarray = block.values[:, 0]
    return codes


def test_rounding_is_to_nearest_and_to_even_where_two_are_as_near() -> None:
    """Every code, every border between two and its neighbours among float32, of both signs."""
    positive = VALUES[:127]
    borders = ((positive[:-1].astype(np.float64) + positive[1:]) / 2).astype(np.float32)
    near = [np.nextafter(borders, np.float32(0)), borders, np.nextafter(borders, np.float32(1e9))]
    numbers = np.concatenate([positive, *near])
    numbers = np.concatenate([numbers, -numbers])
    codes = encoded_with_scale_one(numbers)
    np.testing.assert_array_equal(codes, torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy())
    for number, code in zip(np.abs(numbers).tolist(), (codes & 127).tolist(), strict=True):
        distance = np.abs(positive.astype(np.float64) - number)
        nearest = np.flatnonzero(distance == distance.min()).tolist()
        assert code == (nearest[0] if len(nearest) == 1 else next(one for one in nearest if one % 2 == 0))


@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=50))
@settings(deadline=None, max_examples=200)
def test_any_number_is_rounded_as_torch_does(numbers: list[float]) -> None:
    given_ = np.array(numbers, np.float32)
    expected = torch.from_numpy(given_).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(encoded_with_scale_one(given_), expected)


def test_it_is_what_ml_dtypes_says() -> None:
    """The package comes with onnx; zarr and other libraries name their e4m3 after it."""
    import ml_dtypes

    numbers = np.random.default_rng(0).uniform(-448, 448, 5000).astype(np.float32)
    expected = numbers.astype(ml_dtypes.float8_e4m3fn)
    codes = encoded_with_scale_one(numbers)
    np.testing.assert_array_equal(codes, expected.view(np.uint8))
    np.testing.assert_array_equal(VALUES[codes], expected.astype(np.float32))
