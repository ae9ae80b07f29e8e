"""Retraining is a function: the same arguments, the same bits."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.attribution.measurements import likelihoods, measure
from influence.fold import run
from influence.model import train
from influence.model.supervised import Classification, Regression, labelled
from influence.truth.retraining import resampled, retrain, same_seed
from influence.truth.smoothness import metasmoothness

RNG = np.random.default_rng(0)
POINTS = labelled(RNG.normal(size=(20, 5)), RNG.integers(0, 3, 20))
HELD_OUT = labelled(RNG.normal(size=(3, 5)), np.array([0, 1, 2]), list("abc"))


def apply(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def start(seed):
    keys = jax.random.split(jax.random.key(seed))
    shapes = {"in": (5, 6), "out": (6, 3)}
    return {
        name: jax.random.normal(key, shape, jnp.float32)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


TASK = Classification(apply)
RECIPE = train.Recipe(10, 4, 0.03)
TRAINING = train.Training(TASK, RECIPE, POINTS, start)
ASKED = likelihoods(TASK, HELD_OUT)


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_a_baseline_is_the_same_alone_or_beside_others():
    weights = np.concatenate([np.ones((1, 20)), same_seed(6, 0.2).weights(20)])
    alone = TRAINING.many(weights[:1], [0], at_once=4)
    for places in (np.arange(7), np.array([3, 1, 0, 5])):
        beside = TRAINING.many(weights[places], [0] * len(places), at_once=4)
        at = int(np.flatnonzero(places == 0)[0])
        jax.tree.map(
            lambda x, y, at=at: np.testing.assert_array_equal(x[0], y[at]),
            alone,
            beside,
        )


def test_training_many_is_the_fold_that_trains_one():
    weights = same_seed(2, 0.2).weights(20)[0]
    fold = train.fold(TASK, RECIPE, start(3), POINTS, weights)
    one = run(fold, train.Order(20, RECIPE, 3)).params
    other = TRAINING(weights, 3)
    # Batched products add up in another order; ten steps of Adam carry it on.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one, other)


def test_states_after_any_updates_are_those_of_the_fold_that_trains():
    order = train.Order(20, RECIPE, 1).whole()
    found = TRAINING.states(1, [1, 4, len(order)])
    fold = train.fold(TASK, RECIPE, start(1), POINTS, np.ones(20))
    for state, mark in zip(found, (1, 4, len(order)), strict=True):
        expected = run(fold, [order[:mark]])
        for x, y in (
            (state.params, expected.params),
            (state.optimizer, expected.optimizer),
        ):
            jax.tree.map(np.testing.assert_array_equal, x, y)


def test_what_is_measured_is_what_training_without_the_subset_measures():
    protocol = resampled(3, 0.5, repeats=2)
    truth = retrain(TRAINING, protocol, ASKED, at_once=4)
    assert truth.attrs["protocol"] == "resampled"
    weights = protocol.weights(20)
    np.testing.assert_array_equal(truth.weight, weights)
    for m in range(3):
        for i, seed in enumerate((1, 2)):
            params = TRAINING(weights[m], seed)
            known = [measure(f, params) for f in ASKED.values()]
            np.testing.assert_allclose(truth.measured[m, i], known, atol=1e-5)


def test_training_barely_perturbed_is_smooth_and_chaos_is_not():
    assert metasmoothness(TRAINING, 0, step=0.01, directions=2) > 0.95
    wild = train.Training(TASK, train.Recipe(300, 4, 5.0), POINTS, start)
    assert metasmoothness(wild, 0, step=0.3, directions=2) < 0.8


def test_devices_share_trainings_and_change_nothing():
    program = (
        "import jax, numpy as np\n"
        "from tests.truth.test_retraining import POINTS, TRAINING\n"
        "assert len(jax.devices()) == 2\n"
        "weights = np.ones((4, 20)); weights[1:, 3] = 0\n"
        "spread = TRAINING.many(weights, [0, 0, 1, 1], at_once=4)\n"
        "assert len(spread['in'].sharding.device_set) == 2\n"
        "alone = TRAINING(weights[2], 1)\n"
        "np.testing.assert_allclose(spread['in'][2], alone['in'], atol=1e-5)\n"
    )
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
        capture_output=True,
    )


def test_a_regression_s_labels_and_outputs_are_looked_at():
    task = Regression(lambda params, x: x @ params)
    inputs, ids = {"x": np.ones((2, 3)), "label": np.array([0.0, np.nan])}, ["p", "q"]
    one, many = jnp.zeros(2), jnp.zeros((2, 1))
    with pytest.raises(ValueError, match="Example 'q' has a number that is NaN"):
        task.check(inputs, one, ids)
    with pytest.raises(ValueError, match="Drop the last axis"):
        task.check(inputs, many, ids)


def test_a_class_the_model_has_not_is_named():
    inputs, logits = {"x": np.ones((1, 3)), "label": np.array([3])}, jnp.zeros((1, 3))
    with pytest.raises(ValueError, match="'p' is of class 3, and the model knows 0 to"):
        TASK.check(inputs, logits, ["p"])
