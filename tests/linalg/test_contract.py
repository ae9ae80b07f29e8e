"""A Gram matrix from half its strips is the whole one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.linalg.contract import WIDE, gram


@pytest.mark.parametrize("size", [1, 7, WIDE, WIDE + 1, WIDE + 3])
def test_a_gram_matrix_is_the_product_and_symmetric(size):
    x = jax.random.normal(jax.random.key(0), (5, size), jnp.float64)
    found = gram(x)
    np.testing.assert_allclose(found, x.T @ x, atol=1e-13)  # sums of five products
    np.testing.assert_array_equal(found, found.T)


def test_a_gram_matrix_is_accumulated_in_float32():
    x = jnp.full((1000, 2), 1, jnp.bfloat16)
    assert gram(x).dtype == jnp.float32
    assert (gram(x) == 1000).all()
