"""Inverses of small eigenvalues are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.linalg.damping import (
    Absolute,
    FactoredTikhonov,
    Relative,
    Tikhonov,
    Truncated,
    implied,
)

LAM = jax.random.uniform(jax.random.key(0), (2, 4, 3), jnp.float64, 0.1, 2)


def test_relative_damping_is_each_matrix_s_own():
    lam = jnp.stack([jnp.full((2, 2), 1.0), jnp.full((2, 2), 3.0)])
    found = Relative(0.5)(lam)
    np.testing.assert_allclose(found[:, 0, 0], [1 / 1.5, 1 / 4.5])


def test_what_a_damping_adds_is_what_its_inverse_inverts():
    for damping in (Relative(0.3), Absolute(0.2)):
        np.testing.assert_allclose(
            1 / damping(LAM) - LAM, damping.amount(LAM) + 0 * LAM
        )


def test_factored_tikhonov_damps_both_factors():
    a, s, factor = jnp.array([0.5, 2.0, 3.0]), jnp.array([0.1, 1.0]), 0.2
    delta = factor * a.mean() * s.mean()
    pi = jnp.sqrt(a.mean() / s.mean())
    explicit = jnp.outer(s + jnp.sqrt(delta) / pi, a + pi * jnp.sqrt(delta))
    found = FactoredTikhonov(factor)(jnp.outer(s, a))
    np.testing.assert_allclose(found, 1 / explicit, rtol=1e-12)


def test_filters_are_inverses_far_from_zero_and_nothing_at_zero():
    lam = jnp.array([[0.0, 1e-9, 1e9]])
    for inverse in (Tikhonov(1e-6), Truncated(1e-6)):
        found = inverse(lam)
        np.testing.assert_allclose(found[0, 2], 1e-9, rtol=1e-9)
        assert float(found[0, 0]) == 0
        assert float(found[0, 1]) < 1e-9


def test_training_implies_a_damping():
    # After K steps at rate η a direction of curvature σ is 1 - exp(-ηKσ) of its way;
    # to first order in ηKσ a damped inverse goes as far.
    rate, steps, sigma = 0.01, 5, 1e-4
    gone = 1 - (1 - rate * sigma) ** steps
    damping = implied(rate, steps).damping
    np.testing.assert_allclose(sigma / (sigma + damping), gone, rtol=1e-4)
    np.testing.assert_allclose(implied(rate, steps, momentum=0.9).damping, damping / 10)


@pytest.mark.parametrize("kind", [Relative, Absolute, FactoredTikhonov])
def test_a_negative_damping_is_an_error(kind):
    with pytest.raises(ValueError, match="zero or more, not -0.1"):
        kind(-0.1)


@pytest.mark.parametrize("kind", [Tikhonov, Truncated])
def test_a_filter_without_a_cut_is_an_error(kind):
    with pytest.raises(ValueError, match="positive, not 0"):
        kind(0)
