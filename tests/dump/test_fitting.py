import numpy as np
import pytest
import torch

from kdcache.codecs.base import LayerSpec
from kdcache.codecs.int8 import INT8
from kdcache.codecs.projection import Projector
from kdcache.dump.fitting import Moments, fit_basis
from kdcache.errors import ModelError, NonFiniteError


def _tokens(count: int = 500, width: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) + 100.0 * rng.standard_normal(
        width
    )


def _moments(x: np.ndarray, *, cross: bool = True, batch: int = 77) -> Moments:
    moments = Moments(x.shape[1], cross=cross)
    for first in range(0, len(x), batch):
        moments.add(torch.from_numpy(x[first : first + batch]))
    return moments


def test_streamed_moments_equal_those_of_the_whole() -> None:
    x = _tokens()
    moments = _moments(x)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(x.T, bias=True), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(_moments(x, cross=False).covariance(), x.var(axis=0), rtol=1e-9)


def test_pca_is_the_best_projection_and_reports_its_variances() -> None:
    x = _tokens()
    basis = fit_basis(_moments(x), "pca", 5, seed=0, name="bert", layer=3)
    assert basis.components is not None
    assert basis.mean is not None
    assert basis.explained_variance is not None
    np.testing.assert_allclose(basis.components @ basis.components.T, np.eye(5), atol=1e-5)
    singular = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2 / len(x)
    np.testing.assert_allclose(basis.explained_variance, singular[:5], rtol=1e-4)
    stored = (x - basis.mean) @ basis.components.T
    assert basis.target_variance == pytest.approx(stored.var(axis=0).mean(), rel=1e-4)
    assert basis.total_variance == pytest.approx(x.var(axis=0).mean(), rel=1e-6)
    largest = basis.components[np.arange(5), np.abs(basis.components).argmax(axis=1)]
    assert (largest > 0).all()


def test_pca_does_not_depend_on_how_the_sample_was_batched() -> None:
    x = _tokens()
    one = fit_basis(_moments(x, batch=500), "pca", 6, seed=0, name="bert", layer=1)
    other = fit_basis(_moments(x, batch=13), "pca", 6, seed=0, name="bert", layer=1)
    assert one.components is not None
    assert other.components is not None
    np.testing.assert_allclose(one.components, other.components, atol=1e-5)


def test_random_is_orthonormal_seeded_and_of_its_own_for_each_layer() -> None:
    moments = _moments(_tokens())
    basis = fit_basis(moments, "random", 4, seed=1, name="bert", layer=2)
    again = fit_basis(moments, "random", 4, seed=1, name="bert", layer=2)
    others = [
        fit_basis(moments, "random", 4, seed=seed, name=name, layer=layer)
        for seed, name, layer in ((2, "bert", 2), (1, "roberta", 2), (1, "bert", 3))
    ]
    assert basis.components is not None
    np.testing.assert_array_equal(basis.components, again.components)
    np.testing.assert_allclose(basis.components @ basis.components.T, np.eye(4), atol=1e-6)
    for other in others:
        assert other.components is not None
        assert np.abs(other.components - basis.components).max() > 0.1


def test_none_stores_h_itself_and_measures_its_variance() -> None:
    x = _tokens()
    basis = fit_basis(_moments(x, cross=False), "none", 12, seed=0, name="bert", layer=1)
    assert basis.components is None
    assert basis.mean is None
    assert basis.target_variance == basis.total_variance == pytest.approx(x.var(axis=0).mean())
    hidden = torch.from_numpy(x).float()
    np.testing.assert_array_equal(Projector(basis, "cpu")(hidden), hidden.numpy())


def test_the_projector_applies_what_was_fitted() -> None:
    x = _tokens()
    basis = fit_basis(_moments(x), "pca", 5, seed=0, name="bert", layer=3)
    assert basis.components is not None
    projected = Projector(basis, "cpu")(torch.from_numpy(x).float()).numpy()
    assert projected.dtype == np.float32
    np.testing.assert_allclose(projected, (x - basis.mean) @ basis.components.T, atol=1e-3)


def test_more_dimensions_than_the_layer_has_are_refused_with_both_numbers() -> None:
    where = "layer 3 of teacher 'bert'"
    assert INT8.layer(LayerSpec("none", 128, "int8"), 64, where).dim == 64
    assert INT8.layer(LayerSpec("pca", 64, "int8"), 64, where).dim == 64
    with pytest.raises(ModelError, match=r"dump\.dim is 128, but layer 3 of teacher 'bert' is only 64 wide"):
        INT8.layer(LayerSpec("pca", 128, "int8"), 64, where)


def test_a_sample_that_is_not_finite_is_refused() -> None:
    x = _tokens()
    x[3, 4] = np.nan
    with pytest.raises(NonFiniteError, match="teacher 'bert', layer 2"):
        fit_basis(_moments(x), "pca", 3, seed=0, name="bert", layer=2)


def test_fewer_tokens_than_dimensions_still_give_an_orthonormal_basis() -> None:
    basis = fit_basis(_moments(_tokens(count=3)), "pca", 8, seed=0, name="bert", layer=2)
    assert basis.components is not None
    assert basis.explained_variance is not None
    np.testing.assert_allclose(basis.components @ basis.components.T, np.eye(8), atol=1e-6)
    assert (basis.explained_variance >= 0).all()
