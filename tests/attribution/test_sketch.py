"""A projection of full rank loses nothing, so that its scores have a closed form."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.attribution import sketch
from influence.attribution.measurements import likelihoods
from influence.curvature.diagonal import identity
from influence.curvature.ekfac import fit
from influence.model.supervised import Classification, labelled

RNG = np.random.default_rng(0)
POINTS = labelled(RNG.normal(size=(12, 4)), RNG.integers(0, 3, 12))
HELD_OUT = labelled(RNG.normal(size=(2, 4)), np.array([0, 2]), list("ab"))
TASK = Classification(lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"])
PARAMS = {"in": jnp.asarray(RNG.normal(size=(4, 5)))}
PARAMS["out"] = jnp.asarray(RNG.normal(size=(5, 3)))
ASKED = likelihoods(TASK, HELD_OUT)
BATCHES = POINTS.batches(5)


def explicit(examples):
    """Returns each example's gradient of its loss, `[N, O·I]` by layer."""

    def loss(params, x, label):
        one = {"x": x[None], "label": label[None]}
        return TASK.loss(TASK.outputs(params, one), one["label"])[0]

    found = jax.vmap(jax.grad(loss), (None, 0, 0))(
        PARAMS, jnp.asarray(examples.inputs["x"]), jnp.asarray(examples.inputs["label"])
    )
    return {k: np.asarray(x.mT).reshape(len(examples), -1) for k, x in found.items()}


@cache
def gradients():
    """Returns those of sequences, and those of measurements."""
    return explicit(POINTS), {k: -x for k, x in explicit(HELD_OUT).items()}


@cache
def layers():
    return identity(TASK, PARAMS, BATCHES).layers


def test_sequences_that_are_not_fit_for_the_task_are_refused():
    short = sketch.random(layers(), rank=2)
    odd = labelled(np.full((1, 4), np.nan), np.array([0]), ["odd"])
    with pytest.raises(ValueError, match="'odd' has a number that is NaN"):
        sketch.sketches(TASK, PARAMS, short, odd.batches(1))


def test_sketches_are_projected_gradients():
    each, _ = gradients()
    short = sketch.random(layers(), rank=2)
    found = sketch.sketches(TASK, PARAMS, short, BATCHES)
    for x in layers():
        d = each[x.name].reshape(12, x.outputs, x.columns)
        left, right = np.asarray(short.left[x.name]), np.asarray(short.right[x.name])
        known = (left.T @ d @ right).reshape(12, -1)
        np.testing.assert_allclose(found[x.name], known, atol=1e-12)


def inverse(kernel, damping):
    mean = np.linalg.eigvalsh(kernel).mean()
    return np.linalg.inv(kernel + damping * mean * np.eye(len(kernel)))


@pytest.mark.parametrize("whole", ["random", "leading"])
def test_logra_of_full_rank_inverts_the_gradients_own_covariance(whole):
    each, asked = gradients()
    curvature = fit(TASK, PARAMS, BATCHES)
    projection = (
        sketch.random(layers(), rank=5)
        if whole == "random"
        else sketch.leading(curvature, rank=5)
    )
    found = sketch.logra(TASK, PARAMS, projection, ASKED, BATCHES)
    known = 0
    for k, g in each.items():
        known = known - asked[k] @ inverse(g.T @ g / 12, 0.1) @ g.T / 12
    np.testing.assert_allclose(found, known, atol=1e-9)
    assert found.attrs["unit"] == "nats per added copy"


def test_trackstar_s_scores_are_cosines():
    each, asked = gradients()
    found = sketch.logra(
        TASK, PARAMS, sketch.random(layers(), 5), ASKED, BATCHES, normalise=True
    )
    roots = {}
    for k, g in each.items():
        values, q = np.linalg.eigh(g.T @ g / 12)
        values = np.maximum(values, 0)
        roots[k] = q / np.sqrt(values + 0.1 * values.mean()) @ q.T
    q, g = (np.concatenate([x[k] @ roots[k] for k in each], 1) for x in (asked, each))
    q, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, g))
    np.testing.assert_allclose(found * 12, -q @ g.T, atol=1e-9)
    assert found.attrs["unit"] == "cosine"


def test_trak_inverts_across_layers():
    each, asked = gradients()
    found = sketch.trak(TASK, PARAMS, sketch.random(layers(), 5), ASKED, BATCHES)
    own = sketch.sketches(
        TASK,
        PARAMS,
        sketch.random(layers(), 5),
        BATCHES,
        labels=sketch.Sampled(),
    )
    drawn, g, q = (
        np.concatenate([np.asarray(x[k]) for k in own], 1) for x in (own, each, asked)
    )
    known = -q @ inverse(drawn.T @ drawn / 12, 0.1) @ g.T / 12
    np.testing.assert_allclose(found, known, atol=1e-9)
