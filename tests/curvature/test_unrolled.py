"""Following training is a function of the exact matrix, in the optimizer's metric."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence
from influence.curvature import gauss_newton
from influence.curvature.diagonal import diagonal, identity
from influence.curvature.unrolled import Unrolled, adam_scale
from influence.linalg.basis import Basis
from influence.linalg.damping import Travelled
from influence.model.supervised import Classification, Regression, labelled

RNG = np.random.default_rng(0)
POINTS = labelled(RNG.normal(size=(10, 3)), RNG.integers(0, 3, 10))
TASK = Classification(lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"])
PARAMS = {
    "in": jnp.asarray(RNG.normal(size=(3, 4))),
    "out": jnp.asarray(RNG.normal(size=(4, 3))),
}
BATCHES = POINTS.batches(4)
V = {k: jnp.asarray(RNG.normal(size=(2, *x.shape[::-1]))) for k, x in PARAMS.items()}
SCALE = {k: 0.5 + jnp.abs(x[0]) for k, x in V.items()}
WEIGHTS = sum(x[0].size for x in V.values())


@cache
def curvature():
    return influence.fit(TASK, PARAMS, BATCHES)


def matrix():
    layers = curvature().layers
    act = gauss_newton.operator(TASK, layers, PARAMS, BATCHES)
    return gauss_newton.dense(layers, act, jnp.float64)


@pytest.mark.parametrize("scale", [{}, SCALE], ids=["descent", "adaptive"])
def test_it_is_the_function_of_the_matrix_in_the_metric(scale):
    # After as many steps as there are weights nothing is left to add.
    solver = Unrolled(TASK, BATCHES, 3.0, scale, steps=WEIGHTS + 1)
    found = solver(curvature(), PARAMS, V)
    s = jnp.ones(WEIGHTS)
    if scale:
        s = gauss_newton.flat(
            curvature().layers, {k: x[None] for k, x in scale.items()}
        )[0]
    values, q = jnp.linalg.eigh(s[:, None] * matrix() * s[None])
    act = (q * Travelled(3.0)(jnp.maximum(values, 0))[None]) @ q.T
    known = (gauss_newton.flat(curvature().layers, V) * s[None]) @ act * s[None]
    np.testing.assert_allclose(
        gauss_newton.flat(curvature().layers, found.solved), known, atol=1e-9
    )
    (last,) = found.facts.values()
    assert max(last) < 1e-6


def test_a_short_distance_is_the_gradient_and_a_long_one_the_inverse():
    short = Unrolled(TASK, BATCHES, 1e-6)(curvature(), PARAMS, V).solved
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, 1e-6 * y, rtol=1e-4, atol=1e-10),
        short,
        V,
    )
    # Of a gradient in the matrix's range: training for ever solves it.
    wanted = {k: x[:1] for k, x in V.items()}
    act = gauss_newton.operator(TASK, curvature().layers, PARAMS, BATCHES)
    products = act(act(wanted))
    solver = Unrolled(TASK, BATCHES, 1e9, steps=WEIGHTS)
    found = solver(curvature(), PARAMS, products).solved
    expected = act(wanted)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected
    )


def test_the_metric_is_adam_s_own_as_far_as_final_weights_tell_it():
    squares = diagonal(TASK, PARAMS, BATCHES, labels=influence.Empirical())
    scale = adam_scale(squares, batch=5, floor=0.0)
    for name, block in squares.blocks.items():
        np.testing.assert_allclose(
            1 / scale[name] ** 2, jnp.sqrt(block.lam_OxI / 5), rtol=1e-9
        )


def test_training_of_no_step_is_an_error():
    with pytest.raises(ValueError, match="1 step or more, not 0"):
        Unrolled(TASK, BATCHES, 1.0, steps=0)(curvature(), PARAMS, V)


def test_another_layer_s_scale_is_an_error():
    with pytest.raises(ValueError, match="only one of them has in"):
        Unrolled(TASK, BATCHES, 1.0, {"out": SCALE["out"]})(curvature(), PARAMS, V)


@pytest.mark.parametrize("size", [0.5, 2.0])
def test_the_fitted_curvature_says_where_to_look(size):
    # One output of a linear model: a Kronecker product can be the matrix itself.
    x = RNG.normal(size=(20, 6)) * np.logspace(0, 2, 6)
    points = labelled(x, RNG.normal(size=20))
    task = Regression(lambda params, x: (x @ params["out"])[:, 0])
    params, batches = {"out": jnp.ones((6, 1))}, points.batches(20)
    none = identity(task, params, batches)
    values, q = jnp.linalg.eigh(jnp.asarray(x.T @ x / 20))
    (block,) = none.blocks.values()
    whole = block._replace(inputs=Basis((q,)), lam_OxI=values[None])
    known = replace(none, blocks={"out": whole})
    v = {"out": jnp.ones((1, 1, 6))}
    scale = {"out": jnp.full((1, 6), size)}

    def found(curvature, steps):
        solver = Unrolled(task, batches, 10.0, scale, steps=steps)
        return solver(curvature, params, v).solved["out"]

    exact = found(known, 6)
    errors = [float(jnp.linalg.norm(found(c, 2) - exact)) for c in (none, known)]
    assert errors[1] < errors[0] / 10
