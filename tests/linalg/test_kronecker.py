"""The operator `Q diag(λ) Qᵀ` is that matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.linalg.basis import Basis, eigen, split
from influence.linalg.contract import contract
from influence.linalg.damping import Absolute, Relative
from influence.linalg.kronecker import Kronecker
from tests import cases

ROUNDING = 1e-12  # float64, products of matrices with orthonormal columns


def basis(stack, *lengths):
    """Returns eigenvectors of random blocks of some lengths."""
    square = [cases.normal(i, (*stack, n, n)) for i, n in enumerate(lengths)]
    return Basis(tuple(eigen(x @ x.mT)[1] for x in square))


# How the sides of a matrix of four outputs and three inputs can be cut.
SIDES = {
    "whole": ((4,), (3,)),
    "in blocks": ((2, 2), (2, 1)),
    "one side standard": ((), (3,)),
    "both sides standard": ((), ()),
}


def operator(*stack, sides="whole"):
    outputs, inputs = SIDES[sides]
    lam = jax.random.uniform(jax.random.key(2), (*stack, 4, 3), jnp.float64)
    return Kronecker(basis(stack, *inputs), basis(stack, *outputs), lam)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("stack", [(), (2,), (2, 3)])
def test_multiply_is_the_dense_matrix(stack, sides):
    block = operator(*stack, sides=sides)
    v = cases.normal(1, block.lam_OxI.shape)
    flat = v.reshape(*stack, -1)
    expected = jnp.einsum("...ij,...j->...i", block.dense(), flat)
    found = block.multiply(v).reshape(*stack, -1)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


@pytest.mark.parametrize("sides", SIDES)
def test_rotating_back_undoes_rotating(sides):
    block = operator(2, sides=sides)
    v = cases.normal(1, block.lam_OxI.shape)
    np.testing.assert_allclose(block.unrotate(block.rotate(v)), v, atol=ROUNDING)
    np.testing.assert_allclose(
        jnp.linalg.norm(block.rotate(v)), jnp.linalg.norm(v), rtol=ROUNDING
    )


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize(("lengths", "kept"), [((7,), [3]), ((4, 3), [2, 2]), ((), [])])
def test_leading_directions_are_the_last_of_every_block(stack, lengths, kept):
    whole = basis(stack, *lengths)
    leading = whole.leading(0.4)
    assert [x.shape[-1] for x in leading.blocks] == kept
    assert (leading.whole, leading.directions(7)) == (not kept, sum(kept) or 7)
    for u, q in zip(leading.blocks, whole.blocks, strict=True):
        np.testing.assert_array_equal(u, q[..., q.shape[-1] - u.shape[-1] :])
    assert whole.leading(0.0).directions(7) == (0 if lengths else 7)
    assert whole.leading(1.0).whole


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("lengths", [(7,), (4, 3), ()])
def test_columns_have_the_coordinates_that_rows_have(stack, lengths):
    whole = basis(stack, *lengths)
    x = cases.normal(1, (*stack, 7, 5))
    for turned in (whole.into, whole.out_of, whole.leading(0.4).into):
        expected = turned(x.mT).mT
        np.testing.assert_allclose(turned(x, axis=-2), expected, atol=ROUNDING)


@pytest.mark.parametrize("inverse", [Relative(0.1), Absolute(1e-3)])
def test_solve_inverts_the_damped_matrix(inverse):
    block = operator(2)
    v = cases.normal(1, block.lam_OxI.shape)
    damping = 1 / inverse(block.lam_OxI) - block.lam_OxI
    damped = block._replace(lam_OxI=block.lam_OxI + damping)
    np.testing.assert_allclose(damped.multiply(block.solve(v, inverse)), v, atol=1e-11)


def test_a_side_is_cut_evenly_and_kept_whole_if_it_is_too_long():
    assert split(7, 1, 7) == (7,)
    assert split(7, 2, 7) == (4, 3)
    assert split(3, 9, 7) == (1, 1, 1)
    assert split(7, 1, 6) == ()
    assert split(7, 2, 4) == (4, 3)


def test_eigenvectors_diagonalise_in_float64_whatever_comes_in():
    x = jax.random.normal(jax.random.key(0), (5, 5), jnp.float32)
    covariance = x @ x.T
    _, q = eigen(covariance)
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
