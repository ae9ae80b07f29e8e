"""Following training is a function of the exact matrix, in the optimizer's metric."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence
from influence.curvature import gauss_newton
from influence.curvature.diagonal import diagonal
from influence.curvature.unrolled import Unrolled, adam_scale
from influence.linalg.damping import Travelled
from influence.model.supervised import Classification, labelled

RNG = np.random.default_rng(0)
POINTS = labelled(RNG.normal(size=(10, 3)), RNG.integers(0, 3, 10))
TASK = Classification(lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"])
PARAMS = {
    "in": jnp.asarray(RNG.normal(size=(3, 4))),
    "out": jnp.asarray(RNG.normal(size=(4, 3))),
}
BATCHES = POINTS.batches(4)
CURVATURE = influence.fit(TASK, PARAMS, BATCHES)
LAYERS = CURVATURE.layers
V = {
    x.name: jax.random.normal(jax.random.key(i), (2, x.outputs, x.columns))
    for i, x in enumerate(LAYERS)
}
SCALE = {k: 0.5 + jnp.abs(x[0]) for k, x in V.items()}
WEIGHTS = sum(x[0].size for x in V.values())


def matrix():
    act = gauss_newton.operator(TASK, LAYERS, PARAMS, BATCHES)
    return gauss_newton.dense(LAYERS, act, jnp.float64)


@pytest.mark.parametrize("scale", [{}, SCALE], ids=["descent", "adaptive"])
def test_it_is_the_function_of_the_matrix_in_the_metric(scale):
    solver = Unrolled(TASK, BATCHES, 3.0, scale, steps=WEIGHTS)
    found = solver(CURVATURE, PARAMS, V)
    s = jnp.ones(WEIGHTS)
    if scale:
        s = gauss_newton.flat(LAYERS, {k: x[None] for k, x in scale.items()})[0]
    values, q = jnp.linalg.eigh(s[:, None] * matrix() * s[None])
    act = (q * Travelled(3.0)(jnp.maximum(values, 0))[None]) @ q.T
    known = (gauss_newton.flat(LAYERS, V) * s[None]) @ act * s[None]
    np.testing.assert_allclose(
        gauss_newton.flat(LAYERS, found.solved), known, atol=1e-9
    )
    (last,) = found.facts.values()
    assert max(last) < 1e-6


def test_a_short_distance_is_the_gradient_and_a_long_one_the_inverse():
    short = Unrolled(TASK, BATCHES, 1e-6)(CURVATURE, PARAMS, V).solved
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, 1e-6 * y, rtol=1e-4, atol=1e-10),
        short,
        V,
    )
    # Of a gradient in the matrix's range: training for ever solves it.
    wanted = {k: x[:1] for k, x in V.items()}
    act = gauss_newton.operator(TASK, LAYERS, PARAMS, BATCHES)
    products = act(act(wanted))
    solver = Unrolled(TASK, BATCHES, 1e9, steps=WEIGHTS)
    found = solver(CURVATURE, PARAMS, products).solved
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


def test_another_layer_s_scale_is_an_error():
    with pytest.raises(ValueError, match="only one of them has in"):
        Unrolled(TASK, BATCHES, 1.0, {"out": SCALE["out"]})(CURVATURE, PARAMS, V)
