"""Stacked covariances are decomposed one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.curvature.eigenvectors import one_by_one
from influence.linalg.basis import eigen
from tests import cases


@pytest.mark.parametrize("stack", [(3,), (2, 3)])
def test_a_stack_has_the_eigenvectors_of_its_matrices(stack):
    x = cases.normal(0, (*stack, 6, 6))
    covariances = x @ x.mT
    found = one_by_one(covariances)
    for place in np.ndindex(*stack):
        np.testing.assert_array_equal(found[place], eigen(covariances[place])[1])


def test_what_is_held_meanwhile_does_not_grow_with_the_stack():
    def held(copies):
        shape = jax.ShapeDtypeStruct((copies, 64, 64), jnp.float32)
        said = one_by_one.lower(shape).compile().memory_analysis()
        assert said is not None
        return said.temp_size_in_bytes

    one = 64 * 64 * 8  # as float64
    assert held(16) < held(2) + one
