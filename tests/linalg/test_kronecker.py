"""The operator `Q diag(λ) Qᵀ` is that matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.linalg.contract import contract
from influence.linalg.kronecker import Absolute, Kronecker, Relative, eigenvectors

ROUNDING = 1e-12  # float64, products of matrices with orthonormal columns


def operator(*stack, outputs=4, inputs=3):
    keys = jax.random.split(jax.random.key(0), 3)
    square = [
        jax.random.normal(k, (*stack, n, n), jnp.float64)
        for k, n in zip(keys, (inputs, outputs), strict=False)
    ]
    q_in, q_out = (eigenvectors(x @ jnp.matrix_transpose(x)) for x in square)
    lam = jax.random.uniform(keys[2], (*stack, outputs, inputs), jnp.float64)
    return Kronecker(q_in, q_out, lam)


@pytest.mark.parametrize("stack", [(), (2,), (2, 3)])
def test_multiply_is_the_dense_matrix(stack):
    block = operator(*stack)
    v = jax.random.normal(jax.random.key(1), block.lam_OxI.shape, jnp.float64)
    flat = v.reshape(*stack, -1)
    expected = jnp.einsum("...ij,...j->...i", block.dense(), flat)
    found = block.multiply(v).reshape(*stack, -1)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


@pytest.mark.parametrize("inverse", [Relative(0.1), Absolute(1e-3)])
def test_solve_inverts_the_damped_matrix(inverse):
    block = operator(2)
    v = jax.random.normal(jax.random.key(1), block.lam_OxI.shape, jnp.float64)
    damping = 1 / inverse(block.lam_OxI) - block.lam_OxI
    damped = block._replace(lam_OxI=block.lam_OxI + damping)
    np.testing.assert_allclose(damped.multiply(block.solve(v, inverse)), v, atol=1e-11)


def test_relative_damping_is_each_matrix_s_own():
    lam = jnp.stack([jnp.full((2, 2), 1.0), jnp.full((2, 2), 3.0)])
    found = Relative(0.5)(lam)
    np.testing.assert_allclose(found[:, 0, 0], [1 / 1.5, 1 / 4.5])


def test_eigenvectors_diagonalise_in_float64_whatever_comes_in():
    x = jax.random.normal(jax.random.key(0), (5, 5), jnp.float32)
    covariance = x @ x.T
    q = eigenvectors(covariance)
    assert q.dtype == jnp.float32
    rotated = np.array(q, float).T @ np.array(covariance, float) @ np.array(q, float)
    off = rotated - np.diag(np.diag(rotated))
    # All that is lost is the rounding of the eigenvectors to float32.
    assert np.abs(off).max() < 2 * np.finfo(np.float32).eps * np.abs(rotated).max()


def test_sums_of_bfloat16_are_accumulated_in_float32():
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    total = contract("it,jt->ij", ones, ones)
    assert total.dtype == jnp.float32
    assert float(total[0, 0]) == 4096  # bfloat16 would stop at 256
    assert contract("it,jt->ij", ones, ones.astype(jnp.float64)).dtype == jnp.float64
