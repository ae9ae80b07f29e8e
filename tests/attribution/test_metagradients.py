"""A metagradient is the derivative of retraining."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.attribution.measurements import likelihoods, measure
from influence.attribution.metagradients import metagradients
from influence.model import train
from influence.model.examples import sequences
from influence.model.supervised import Classification, Regression, labelled
from influence.model.task import LanguageModel

RNG = np.random.default_rng(0)
POINTS = labelled(RNG.normal(size=(12, 5)), RNG.integers(0, 3, 12))
HELD_OUT = labelled(RNG.normal(size=(3, 5)), np.array([0, 1, 2]), ["a", "b", "c"])
RECIPES = {
    "sgd": train.Recipe(20, 4, 0.1, train.SGD(momentum=0.9, decay=0.01)),
    "adamw": train.Recipe(20, 4, 0.02, train.AdamW(root=1e-6)),
}


def apply(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def start(seed):
    keys = jax.random.split(jax.random.key(seed))
    shapes = {"in": (5, 6), "out": (6, 3)}
    return {
        name: jax.random.normal(key, shape) / 2
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


TASK = Classification(apply)
ASKED = likelihoods(TASK, HELD_OUT)


@pytest.mark.parametrize("name", RECIPES)
def test_metagradients_are_finite_differences_of_retraining(name):
    training = train.Training(TASK, RECIPES[name], POINTS, start)
    exact = metagradients(training, 3, ASKED, at_once=2)
    assert exact.attrs["unit"] == "nats per added copy"
    for n in (0, 5, 11):
        weights = np.ones((2, 12))
        weights[:, n] += 1e-5, -1e-5
        up, down = (training(x, 3) for x in weights)
        found = [(measure(f, up) - measure(f, down)) / 2e-5 for f in ASKED.values()]
        # The difference of two values of size 1 loses 1e-16 / 1e-5; the second-order
        # term of the step is of like size.
        np.testing.assert_allclose(exact[:, n], found, atol=1e-8, rtol=1e-5)


def test_they_do_not_depend_on_how_many_go_back_at_once():
    training = train.Training(TASK, RECIPES["adamw"], POINTS, start)
    each, all_three = (metagradients(training, 0, ASKED, at_once=k) for k in (1, 3))
    np.testing.assert_allclose(each, all_three, atol=1e-14)


def test_labels_have_shares_that_add_up_and_are_finite_differences():
    texts = sequences([[1, 2, 3, 4], [2, 3, 5], [4, 3, 1, 0], [5, 5, 2, 3]])
    task = LanguageModel(lambda params, tokens: params[tokens])
    table = jax.random.normal(jax.random.key(0), (6, 6))
    recipe = train.Recipe(6, 2, 0.3, train.SGD(momentum=0.5))
    training = train.Training(task, recipe, texts, lambda seed: table)
    asked = likelihoods(task, texts.take([0, 2]))
    tokens = metagradients(training, 0, asked, by_token=True)
    assert tokens.dims == ("query", "train", "token")
    np.testing.assert_allclose(
        tokens.sum("token"), metagradients(training, 0, asked), atol=1e-12
    )
    # The last position predicts nothing, and neither does padding.
    np.testing.assert_array_equal(tokens[:, :, -1], 0)
    weights = np.ones((2, 4, 4))
    weights[:, 3, 1] += 1e-5, -1e-5
    up, down = (training(x, 0) for x in weights)
    found = [(measure(f, up) - measure(f, down)) / 2e-5 for f in asked.values()]
    np.testing.assert_allclose(tokens[:, 3, 1], found, atol=1e-8, rtol=1e-5)


def test_an_update_without_a_derivative_is_an_error():
    # Nothing moves the second moment of this parameter away from zero.
    recipe = train.Recipe(20, 4, 0.02, train.AdamW(root=0.0, decay=0.0))

    def begin(seed):
        return {**start(seed), "unused": jnp.ones(2)}

    training = train.Training(TASK, recipe, POINTS, begin)
    with pytest.raises(ValueError, match="give the optimizer a `root`"):
        metagradients(training, 0, ASKED)


def test_a_sequence_that_is_not_fit_for_the_task_is_an_error():
    shapes = {"embed": (5, 3), "head": (3, 5)}
    begun = {k: jnp.ones(x) for k, x in shapes.items()}
    task = LanguageModel(lambda params, t: params["embed"][t] @ params["head"])
    recipe = train.Recipe(2, 2, 0.1, train.SGD())
    odd = sequences([[1, 2, 3], [1, 7, 2]])
    training = train.Training(task, recipe, odd, lambda seed: begun)
    with pytest.raises(ValueError, match="token id 7"):
        metagradients(training, 0, ASKED)


def test_training_that_diverges_is_an_error():
    task = Regression(lambda params, x: apply(params, x)[:, 0])
    recipe = train.Recipe(20, 4, 1e30, train.SGD())
    training = train.Training(task, recipe, POINTS, start)
    with pytest.raises(ValueError, match="Lower the learning rate"):
        metagradients(training, 0, ASKED)
