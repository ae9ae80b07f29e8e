"""Products are what they are by any way: half of a Gram matrix, sides exchanged."""

import jax.numpy as jnp
import numpy as np
import pytest

from influence.linalg.contract import WIDE, gram, half, inner, mirrored
from tests import cases


@pytest.mark.parametrize("size", [1, 7, WIDE, WIDE + 1, WIDE + 3])
def test_a_gram_matrix_is_the_product_and_symmetric(size):
    x = cases.normal(0, (5, size))
    found = gram(x)
    np.testing.assert_allclose(found, x.T @ x, atol=1e-13)  # sums of five products
    np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize("size", [7, WIDE + 3])
def test_halves_add_up_to_the_whole(size):
    x = cases.normal(0, (2, 5, size))
    weight = jnp.arange(10.0).reshape(2, 5, 1)
    first, second = (half(y, y * w) for y, w in zip(x, weight, strict=True))
    expected = jnp.einsum("kni,knj->ij", x, x * weight)
    np.testing.assert_allclose(
        mirrored(first + second), expected, atol=1e-12
    )  # sums of ten


@pytest.mark.parametrize("sizes", [(3, 8), (8, 3), (4, 4)])
def test_inner_products_are_those_of_every_pair(sizes):
    x, y = (cases.normal(n, (n, 6)) for n in sizes)
    np.testing.assert_allclose(inner(x, y), x @ y.T, atol=1e-13)  # sums of six
    assert inner(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)).dtype == jnp.float32


def test_a_gram_matrix_is_accumulated_in_float32():
    x = jnp.full((1000, 2), 1, jnp.bfloat16)
    assert gram(x).dtype == jnp.float32
    assert (gram(x) == 1000).all()
