"""Gradients in the eigenbasis are the same, whatever is turned and multiplied first."""

import jax.numpy as jnp
import numpy as np
import pytest

from influence.curvature import coordinates, eigenvalues
from influence.linalg.basis import Basis, eigen
from tests import cases

ROUNDING = 1e-12  # float64, relative to the largest number of all.

B, LONG, SHORT = 3, 9, 4

FEW, MANY = 2, 30
"""Positions of which less work is to turn each, and of which it is not."""


@pytest.mark.parametrize(("outputs", "inputs"), [(LONG, SHORT), (SHORT, LONG)])
@pytest.mark.parametrize("positions", [FEW, MANY])
def test_gradients_in_the_eigenbasis_are_turned_gradients(positions, outputs, inputs):
    a, g = (cases.normal(i, (B, positions, n)) for i, n in enumerate((inputs, outputs)))
    q_in, q_out = (
        Basis((eigen(x @ x.T)[1],))
        for x in (cases.normal(n, (n, n)) for n in (inputs, outputs))
    )
    given = q_in, {"w": q_out}
    expected = jnp.einsum(
        "bto,bti,ox,iy->bxy", g, a, q_out.dense(outputs), q_in.dense(inputs)
    )

    pairs, _ = coordinates.apart(a, {"w": g}, *given)
    assert bool(pairs) == (positions == FEW)

    def check(found, law):
        atol = ROUNDING * float(jnp.abs(law).max())
        np.testing.assert_allclose(found, law, rtol=0, atol=atol)

    check(coordinates.rotated(a, {"w": g}, *given)["w"], expected)
    squares = eigenvalues.READING.at(a, {"w": g}, given, None)["w"]
    check(squares, (expected**2).sum(0))
