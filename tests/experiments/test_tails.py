"""A power law is told from what is none, and its exponent found."""

import numpy as np
import pytest

from experiments.tails import power_law, top_share


def drawn(exponent, count, seed):
    """Returns a sample of a power law that begins at 1."""
    rng = np.random.default_rng(seed)
    return (1 - rng.random(count)) ** (-1 / (exponent - 1))


@pytest.mark.parametrize("exponent", [1.5, 2.2, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_exponent_is_found(exponent, seed):
    found = power_law(drawn(exponent, 2000, seed), np.random.default_rng(0), 10)
    # Three standard errors, and there are nine cases.
    assert abs(found.exponent - exponent) < 3 * found.error


def test_units_do_not_matter():
    x = drawn(2.5, 300, 0)
    one, other = (power_law(s * x, np.random.default_rng(0)) for s in (1, 1e-6))
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_samples_of_the_law_are_as_far_from_it_as_they_should_be():
    found = [
        power_law(drawn(2.5, 200, seed), np.random.default_rng(seed), 100).plausible
        for seed in range(200)
    ]
    # Uniform: a tenth is below 0.1, give or take 0.02, and half below 0.5.
    assert abs(np.mean(np.array(found) <= 0.1) - 0.1) < 0.06
    assert abs(np.mean(found) - 0.5) < 0.06


def test_an_exponential_tail_is_ruled_out():
    x = 1 + np.random.default_rng(0).exponential(1.0, 500)
    assert power_law(x, np.random.default_rng(0)).plausible <= 0.1


def test_shares_of_the_top():
    even, one = np.ones(200), np.r_[np.zeros(99), 1.0]
    assert top_share(even, 0.01) == pytest.approx(0.01)
    assert top_share(one, 0.01) == 1
    assert top_share(np.r_[one, -np.ones(100)], 0.005) == 1
    assert np.isnan(top_share(-even, 0.01))
