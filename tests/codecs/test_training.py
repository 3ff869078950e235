"""Where bits go, how tables are trained, how rows are searched: each against something slower and plainer."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.codecs.base import Basis, LayerSpec
from kdcache.codecs.trellis import TRELLIS, codebook_of
from kdcache.codecs.trellis.codebook import Codebook, decode_rows, table_sizes
from kdcache.codecs.trellis.coder import Coder, best_windows, search_on_device
from kdcache.codecs.trellis.compiled import CompiledSearch
from kdcache.codecs.trellis.fit import DISTORTION, allot_bits, train_codebook
from kdcache.codecs.trellis.viterbi import Viterbi
from kdcache.dump.fitting import LayerFit


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.integers(0, 300))
@settings(deadline=None, max_examples=200)
def test_bits_sum_to_the_budget_and_follow_the_variance(variances: list[float], budget: int) -> None:
    variance = np.sort(np.array(variances))[::-1]
    bits = allot_bits(variance, budget)
    assert bits.sum(dtype=int) == min(budget, 8 * len(bits))
    assert (np.diff(bits.astype(int)) <= 0).all()
    assert bits.max(initial=0) <= 8


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=4), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_no_other_allotment_has_less_distortion(variances: list[float], budget: int) -> None:
    variance, curve = np.array(variances), np.array(DISTORTION)
    every = (bits for bits in itertools.product(range(9), repeat=len(variance)) if sum(bits) == budget)
    least = min(float((variance * curve[list(bits)]).sum()) for bits in every)
    assert float((variance * curve[allot_bits(variance, budget)]).sum()) == pytest.approx(least)


def test_the_curve_is_convex() -> None:
    """Else the next bit alone could not say where the next two go."""
    drops = -np.diff(DISTORTION)
    assert (drops > 0).all()
    assert (np.diff(drops) < 0).all()


def test_without_a_window_training_is_lloyds_loop() -> None:
    values = torch.randn(3000, 1, generator=torch.Generator().manual_seed(1)) * 2.0 + torch.tensor([0.3])
    trained = train_codebook(values, np.array([3], np.uint8), np.array([2.0]), window=0, rounds=20)
    start = train_codebook(values, np.array([3], np.uint8), np.array([2.0]), window=0, rounds=0)
    plain = values.numpy().ravel().astype(np.float64)
    levels = start.levels * start.scale[0]
    for _ in range(20):
        owner = np.abs(plain[:, None] - levels).argmin(axis=1)
        levels = np.array([plain[owner == place].mean() for place in range(8)])
    np.testing.assert_allclose(trained.levels * trained.scale[0], levels, rtol=1e-4)
    owner = np.abs(plain[:, None] - levels).argmin(axis=1)
    assert np.square(plain - levels[owner]).mean() / plain.var() == pytest.approx(
        0.0345, rel=0.05
    )  # Max, 1960: 8 levels


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(0, 4), st.integers(0, 2**16))
@settings(deadline=None, max_examples=60)
def test_the_search_finds_the_best_of_all_rows(depths: list[int], window: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    bits = np.array(depths, np.uint8)
    levels = generator.standard_normal(sum(table_sizes(bits, window).values())).astype(np.float32)
    codebook = Codebook(bits, generator.random(len(bits)).astype(np.float32) + 0.1, window, levels)
    size = -(-sum(depths) // 8)
    numbers = np.arange(1 << sum(depths)) << (8 * size - sum(depths))
    every = np.array([list(int(number).to_bytes(size, "big")) for number in numbers], np.uint8)
    wanted = generator.standard_normal((4, len(bits))).astype(np.float32)
    errors = np.square(decode_rows(every, codebook)[None] - wanted[:, None]).sum(axis=2)
    rows = Coder(codebook, size, "cpu")(torch.from_numpy(wanted))
    found = np.square(decode_rows(rows, codebook) - wanted).sum(axis=1)
    np.testing.assert_allclose(found, errors.min(axis=1), rtol=1e-4, atol=1e-5)


def _layer(rows: int, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, width, generator=generator) * torch.logspace(1, -1, width) + 3.0


def _fitted(hidden: torch.Tensor, row_bytes: int) -> Basis:
    rows, width = hidden.shape
    fit = LayerFit(TRELLIS.layer(LayerSpec("pca", 0, "coded", row_bytes), width, "a layer"), width, rows, seed=0)
    fit.add(hidden, np.arange(rows))
    return fit.basis(name="t", layer=1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [0, 3, 6])
def test_the_search_of_the_cpu_finds_what_that_of_a_gpu_finds(
    window: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setitem(sys.modules, "kdcache.codecs.trellis.compiled", None)
    generator = torch.Generator().manual_seed(window)
    bits = [8, 7, 5, 5, 4, 3, 2, 2, 1, 1, 1, 1]
    levels = [torch.randn(1 << max(window, depth), generator=generator) * depth for depth in bits]
    coordinates = torch.randn(150, len(bits), generator=generator) * torch.tensor(bits)
    monkeypatch.setattr("kdcache.codecs.trellis.viterbi._TOKENS", 64)  # several blocks, the last one short
    assert (
        best_windows(coordinates, levels, bits, window) == search_on_device(coordinates, levels, bits, window)
    ).all()


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=24), st.integers(0, 8), st.integers(0, 300), st.integers(0, 2**16)
)
@settings(deadline=None, max_examples=60)
def test_the_compiled_search_finds_the_same_rows(depths: list[int], window: int, tokens: int, seed: int) -> None:
    """To the byte: whether numba is installed is no part of what a cache says of itself."""
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(1 << max(window, depth), generator=generator) for depth in depths]
    coordinates = torch.randn(tokens, len(depths), generator=generator)
    np.testing.assert_array_equal(
        CompiledSearch(levels, depths, window).windows_of(coordinates.numpy()),
        _plain(levels, depths, window).windows_of(coordinates),
    )


def _plain(levels: list[torch.Tensor], bits: list[int], window: int) -> Viterbi:
    """The search without numba."""
    search = Viterbi(levels, bits, window)
    search._compiled = None
    return search


def test_equal_costs_are_resolved_alike() -> None:
    bits = [3, 2, 5, 1, 1, 4]
    levels = [torch.zeros(1 << max(4, depth)) for depth in bits]
    assert not _plain(levels, bits, 4).windows_of(torch.ones(3, 6)).any()
    levels = [torch.arange(1 << max(4, depth)).remainder(3).float() for depth in bits]  # the same few levels, often
    coordinates = torch.arange(200 * 6).remainder(7).float().view(200, 6) / 2
    np.testing.assert_array_equal(
        CompiledSearch(levels, bits, 4).windows_of(coordinates.numpy()),
        _plain(levels, bits, 4).windows_of(coordinates),
    )


def test_a_token_gets_the_same_row_in_any_batch() -> None:
    """Else a part that is dumped again after a crash, or by a live teacher, would have other bytes."""
    hidden = _layer(900)
    basis = _fitted(hidden, 8)
    assert basis.components is not None
    coordinates = hidden @ torch.from_numpy(basis.components).T
    coder = Coder(codebook_of(basis), 8, "cpu")
    for count in (1, 100, 513):
        np.testing.assert_array_equal(coder(coordinates[:count]), coder(coordinates)[:count])


def test_bits_beat_a_cut_at_the_same_bytes_and_more_bytes_keep_more() -> None:
    hidden, unseen = _layer(4000), _layer(5000)[4000:]
    kept = []
    for size in (2, 4, 8, 16):
        basis = _fitted(hidden, size)
        assert basis.components is not None and basis.mean is not None
        coordinates = (unseen.numpy() - basis.mean) @ basis.components.T
        decoded = decode_rows(Coder(codebook_of(basis), size, "cpu")(torch.from_numpy(coordinates)), codebook_of(basis))
        back = decoded @ basis.components + basis.mean
        kept.append(1 - np.square(back - unseen.numpy()).sum() / np.square(unseen.numpy() - basis.mean).sum())
        assert basis.target_variance == pytest.approx(float(decoded.var(axis=0).mean()), rel=0.15)
    assert kept == sorted(kept)
    spectrum = np.sort(np.linalg.eigvalsh(np.cov(hidden.numpy().T)))[::-1]
    cut_at_four_bytes = spectrum[:4].sum() / spectrum.sum()  # one byte each, were it exact and without a scale
    assert kept[1] > cut_at_four_bytes
    assert kept[3] > 0.99


def test_the_same_sample_gives_the_same_codebook() -> None:
    hidden = _layer(500)
    one, other = (_fitted(hidden, 4) for _ in range(2))
    for name, values in one.tables.items():
        np.testing.assert_array_equal(other.tables[name], values)


def test_a_layer_that_never_changes_is_coded_as_what_it_is() -> None:
    hidden = torch.full((50, 6), 2.5)
    basis = _fitted(hidden, 2)
    assert basis.components is not None and basis.mean is not None
    rows = Coder(codebook_of(basis), 2, "cpu")(
        (hidden - torch.from_numpy(basis.mean)) @ torch.from_numpy(basis.components).T
    )
    np.testing.assert_allclose(decode_rows(rows, codebook_of(basis)), 0.0, atol=1e-6)
