import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcache.dump.quantise import dequantise, quantise, unstorable_token
from kdcache.errors import NonFiniteError

_SHAPES = st.tuples(st.integers(0, 6), st.integers(1, 9))
_ANY_SIZE = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True)
_MATRICES = hnp.arrays(np.float32, _SHAPES, elements=_ANY_SIZE)


@given(_MATRICES)
@settings(deadline=None, max_examples=200)
def test_int8_is_within_half_a_scale_and_codes_never_reach_the_fill_value(x: np.ndarray) -> None:
    block = quantise(x, "int8")
    assert block.values.dtype == np.int8
    assert block.scales is not None
    assert block.scales.dtype == np.float32
    assert (np.abs(block.values.astype(int)) <= 127).all()
    scales = block.scales.astype(np.float64)[:, None]
    tiny = np.abs(x).max(axis=1, keepdims=True, initial=0.0) < 128 * np.finfo(np.float32).smallest_normal
    bound = np.where(tiny, np.abs(x), scales * (0.5 + 1e-4))  # float32 rounding of the scale and of the quotient: 127 ulps
    assert (np.abs(block.values * scales - x.astype(np.float64)) <= bound).all()


@given(_MATRICES)
@settings(deadline=None, max_examples=200)
def test_int8_codes_are_idempotent(x: np.ndarray) -> None:
    once = quantise(x, "int8")
    twice = quantise(dequantise(once), "int8")
    assert once.scales is not None
    assert twice.scales is not None
    np.testing.assert_allclose(twice.scales, once.scales, rtol=2.0**-22)
    kept = twice.scales > 0  # a scale at the very edge of the normal numbers may fall over it
    np.testing.assert_array_equal(twice.values[kept], once.values[kept])
    assert (once.scales[~kept] <= 2 * np.finfo(np.float32).smallest_normal).all()


def test_a_token_of_zeros_decodes_to_zeros() -> None:
    x = np.array([[0.0, 0.0], [1.0, -2.0]], np.float32)
    block = quantise(x, "int8")
    assert block.scales is not None
    assert block.scales[0] == 0.0
    np.testing.assert_array_equal(dequantise(block)[0], [0.0, 0.0])
    np.testing.assert_allclose(dequantise(block)[1], [1.0, -2.0], atol=1 / 127)


def test_float32_is_kept_and_float16_is_rounded() -> None:
    x = np.array([[1.0009765625, 65504.0, -3.1415927]], np.float32)
    np.testing.assert_array_equal(dequantise(quantise(x, "float32")), x)
    half = quantise(x, "float16")
    assert half.scales is None
    np.testing.assert_array_equal(half.values, x.astype(np.float16))


def test_float16_overflow_is_refused_with_its_token_and_a_cure() -> None:
    x = np.array([[1.0, 2.0], [3.0, -70000.0]], np.float32)
    with pytest.raises(NonFiniteError, match="token 1: 70000 is beyond float16") as caught:
        quantise(x, "float16")
    assert "int8" in caught.value.hint
    quantise(x, "int8")
    assert unstorable_token(np.array([[65519.0]], np.float32), "float16") is None
    assert np.isfinite(np.float32(65519.0).astype(np.float16))
    assert unstorable_token(np.array([[65520.0]], np.float32), "float16") is not None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_what_is_not_finite_is_refused(bad: float, dtype: str) -> None:
    x = np.array([[1.0, 2.0], [3.0, bad]], np.float32)
    with pytest.raises(NonFiniteError, match="token 1: NaN or infinity"):
        quantise(x, dtype)
