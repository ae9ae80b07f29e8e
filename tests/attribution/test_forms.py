"""Queries made small lose what they say they lose, and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.attribution.forms import (
    Joint,
    Plain,
    Projected,
    Whitened,
    dense,
    factored,
)
from influence.linalg.basis import Basis, eigen
from influence.linalg.kronecker import Kronecker
from tests import cases

Q, O, I = 4, 6, 5  # noqa: E741


def normal(seed, *shape):
    return cases.normal(seed, shape)


def block(seed=0):
    """Returns a curvature whose eigenvalues fall off quickly on both sides."""
    q_in, q_out = (
        Basis((eigen(x @ x.mT)[1],)) for x in (normal(seed, I, I), normal(seed, O, O))
    )
    fall = [10.0 ** -jnp.linspace(0, 3, n, dtype=jnp.float64) for n in (O, I)]
    noise = jnp.exp(0.3 * normal(seed + 1, O, I))
    return Kronecker(q_in, q_out, noise * jnp.outer(fall[0], fall[1]))


def score_error(curvature, c, form):
    """Returns the expected squared error of scores, for gradients as the curvature has.

    `E⟨h - h', DW⟩² = Σ λ (Qᵀ (h - h') Q)²` for gradients of covariance `Q diag(λ) Qᵀ`.
    """
    error = c - jax.vmap(curvature.rotate)(dense(form).h_QxOxI)
    return np.asarray((curvature.lam_OxI[None] * error**2).sum((1, 2)))


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_whitened_truncation_has_the_smaller_error_of_scores(rank, seed):
    curvature = block(seed)
    # Queries as they are: gradients of the curvature's covariance, after the inverse.
    roots = jnp.sqrt(curvature.lam_OxI)
    mean = curvature.lam_OxI.mean()
    solved = (roots / (curvature.lam_OxI + 0.1 * mean))[None] * normal(
        seed + 9, Q, O, I
    )
    plain, whitened = (
        score_error(curvature, solved, make(rank)(curvature, solved).form).sum()
        for make in (Plain, Whitened)
    )
    assert whitened < plain


@pytest.mark.parametrize("make", [Plain, Whitened, Joint])
def test_at_full_rank_nothing_is_lost(make):
    curvature, c = block(), normal(2, Q, O, I)
    found, h = make(O)(curvature, c), jax.vmap(curvature.unrotate)(c)
    np.testing.assert_allclose(dense(found.form).h_QxOxI, h, atol=1e-11)
    np.testing.assert_allclose(found.kept_Q, found.energy_Q, rtol=1e-12)
    np.testing.assert_allclose(dense(factored(found.form)).h_QxOxI, h, atol=1e-11)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_plainly_truncated_query_is_the_nearest_of_its_rank(rank):
    curvature, c = block(), normal(0, Q, O, I)
    found, h = Plain(rank)(curvature, c), jax.vmap(curvature.unrotate)(c)
    singular = np.linalg.svd(np.asarray(h), compute_uv=False)
    # Eckart and Young: what is left is what the other singular values weigh.
    expected = (singular[:, rank:] ** 2).sum(1)
    left = np.asarray((h - dense(found.form).h_QxOxI) ** 2).sum((1, 2))
    np.testing.assert_allclose(left, expected, rtol=1e-10)
    np.testing.assert_allclose(found.energy_Q - found.kept_Q, expected, rtol=1e-10)


def test_a_whitened_truncation_is_the_best_where_eigenvalues_are_a_product():
    # Then the whitening is exact, and the truncated SVD is the best approximation.
    curvature = block()
    lam = curvature.lam_OxI
    product = lam.mean(1, keepdims=True) * lam.mean(0)[None] / lam.mean()
    curvature, c = curvature._replace(lam_OxI=product), normal(3, Q, O, I)
    found = Whitened(2)(curvature, c)
    error = score_error(curvature, c, found.form)
    np.testing.assert_allclose(error, found.energy_Q - found.kept_Q, rtol=1e-9)


def test_one_basis_serves_queries_that_are_alike():
    curvature = block()
    left, right = normal(4, O, 2), normal(5, I, 2)
    h = left[None] @ normal(6, Q, 2, 2) @ right.mT[None]
    found = Joint(2)(curvature, jax.vmap(curvature.rotate)(h))
    assert isinstance(found.form, Projected)
    assert found.form.left_OxR.shape == (O, 2)
    assert found.form.core_QxRxR.shape == (Q, 2, 2)
    np.testing.assert_allclose(dense(found.form).h_QxOxI, h, atol=1e-10)
    others = Joint(2)(curvature, normal(7, Q, O, I))
    assert (np.asarray(others.kept_Q) < np.asarray(others.energy_Q)).all()


def test_a_rank_is_positive():
    for make in (Plain, Whitened, Joint):
        with pytest.raises(ValueError, match="1 or more, not 0"):
            make(0)
