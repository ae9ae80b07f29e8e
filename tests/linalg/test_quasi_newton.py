"""Several functions find their minima, each at its own pace."""

from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.linalg.quasi_newton import lbfgs
from influence.linalg.solvers import dot


def valley(x):
    """Returns Rosenbrock's function of a point in two arrays: least, 0, at (1, 1)."""
    return 100 * (x["b"][0] - x["a"][0] ** 2) ** 2 + (1 - x["a"][0]) ** 2


def found(function, start, steps, scale=1.0):
    walk = lbfgs(
        jax.vmap(jax.value_and_grad(function)),
        lambda v: jax.tree.map(lambda y: scale * y, v),
        start,
    )
    return list(islice(walk, steps))


# A first step ten times too long or too short only takes longer.
@pytest.mark.parametrize("scale", [10.0, 1.0, 0.1])
def test_bent_valleys_are_walked_to_their_ends(scale):
    start = {"a": jnp.array([[-1.2], [0.0], [3.0]]), "b": jnp.array([[1.0], [0], [-2]])}
    points = found(valley, start, 120, scale)
    np.testing.assert_allclose(points[-1].x["a"], 1, atol=1e-6)
    np.testing.assert_allclose(points[-1].x["b"], 1, atol=1e-6)
    values = np.stack([point.value_M for point in points])
    assert (values[1:] <= (1 + 1e-6) * values[:-1]).all()


def test_from_the_true_inverse_a_quadratic_takes_one_step():
    a = jax.random.normal(jax.random.key(0), (6, 6))
    a = a @ a.T + jnp.eye(6)
    b = jax.random.normal(jax.random.key(1), (3, 6))
    inverse = jnp.linalg.inv(a)
    walk = lbfgs(
        lambda x: ((x @ a * x).sum(1) / 2 - (b * x).sum(1), x @ a - b),
        lambda v: v @ inverse,
        jnp.zeros((3, 6)),
    )
    *_, second = islice(walk, 2)
    np.testing.assert_allclose(second.x, b @ inverse, atol=1e-12)
    assert float(dot(second.slope, second.slope).max()) < 1e-20


def test_functions_do_not_depend_on_those_beside_them():
    start = {"a": jnp.array([[-1.2], [3.0]]), "b": jnp.array([[1.0], [-2.0]])}
    both = found(valley, start, 30)[-1]
    for i in range(2):
        one = found(valley, jax.tree.map(lambda x, i=i: x[i : i + 1], start), 30)[-1]
        np.testing.assert_allclose(both.value_M[i], one.value_M[0], rtol=1e-10)
