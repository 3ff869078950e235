"""The contract of storage formats, for those that lie in this directory's room; and what each promises beyond it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcache.codecs.base import Basis, LayerSpec
from kdcache.codecs.int8 import INT8
from kdcache.codecs.plain import FLOAT16, FLOAT32
from kdcache.codecs.trellis import TRELLIS
from kdcache.errors import NonFiniteError
from kdcache.testing.caches import CODED, made_basis, made_teacher
from kdcache.testing.codec_contract import WIDTH, CodecContract

_ANY_SIZE = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True)
_MATRICES = hnp.arrays(np.float32, st.tuples(st.integers(0, 6), st.just(WIDTH)), elements=_ANY_SIZE)


class TestFloat32(CodecContract):
    storage = FLOAT32

    @given(_MATRICES)
    @settings(deadline=None, max_examples=50)
    def test_nothing_is_lost(self, x: np.ndarray) -> None:
        np.testing.assert_array_equal(self.decoded(self.encoded(x)), x)


class TestFloat16(CodecContract):
    storage = FLOAT16
    largest = 65504.0
    beyond = 65520.0

    def test_values_are_rounded_and_overflow_is_refused_with_a_cure(self) -> None:
        x = np.array([[1.0009765625, 65504.0, -3.1415927, 65519.0, 6e-8, 0.0]], np.float32)
        block = self.encoded(x)
        assert block.scales is None
        np.testing.assert_array_equal(block.values, x.astype(np.float16))
        x[0, 1] = -70000
        with pytest.raises(NonFiniteError, match="token 0: 70000 is beyond float16") as caught:
            self.encoded(x)
        assert "int8" in caught.value.hint


class TestInt8(CodecContract):
    storage = INT8

    @given(_MATRICES)
    @settings(deadline=None, max_examples=200)
    def test_a_value_is_within_half_a_scale_and_codes_never_reach_the_fill_value(self, x: np.ndarray) -> None:
        block = self.encoded(x)
        assert block.scales is not None
        assert (np.abs(block.values.astype(int)) <= 127).all()
        scales = block.scales.astype(np.float64)[:, None]
        tiny = np.abs(x).max(axis=1, keepdims=True, initial=0.0) < 128 * np.finfo(np.float32).smallest_normal
        bound = np.where(
            tiny, np.abs(x), scales * (0.5 + 1e-4)
        )  # float32 rounding of the scale and of the quotient: 127 ulps
        assert (np.abs(block.values * scales - x.astype(np.float64)) <= bound).all()

    @given(_MATRICES)
    @settings(deadline=None, max_examples=200)
    def test_codes_are_idempotent(self, x: np.ndarray) -> None:
        once = self.encoded(x)
        twice = self.encoded(self.decoded(once))
        assert once.scales is not None
        assert twice.scales is not None
        np.testing.assert_allclose(twice.scales, once.scales, rtol=2.0**-22)
        kept = twice.scales > 0  # a scale at the very edge of the normal numbers may fall over it
        np.testing.assert_array_equal(twice.values[kept], once.values[kept])
        assert (once.scales[~kept] <= 2 * np.finfo(np.float32).smallest_normal).all()

    def test_a_token_of_zeros_decodes_to_zeros(self) -> None:
        x = np.array([[0.0, 0.0], [1.0, -2.0]], np.float32)
        block = self.encoded(x)
        assert block.scales is not None
        assert block.scales[0] == 0.0
        np.testing.assert_array_equal(self.decoded(block)[0], [0.0, 0.0])
        np.testing.assert_allclose(self.decoded(block)[1], [1.0, -2.0], atol=1 / 127)


class TestTrellis(CodecContract):
    storage = TRELLIS
    largest = 50.0
    every_code_counts = True

    def layer(self) -> tuple[LayerSpec, Basis]:
        return CODED, made_basis(made_teacher("bert", {2: CODED}), 2)
