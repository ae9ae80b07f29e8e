"""Every method makes scores of the same shape, and those that should predict, do."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.attribution.measurements import likelihoods
from influence.attribution.metagradients import metagradients
from influence.model import train
from influence.model.examples import sequences
from influence.model.supervised import Regression, labelled
from influence.model.task import LanguageModel
from influence.truth.methods import METHODS, exact, unrolled
from influence.truth.subject import Subject

RNG = np.random.default_rng(0)


@cache
def language():
    """Returns a subject of text: bigrams, with a matrix between."""
    tokens = RNG.integers(0, 7, (12, 6)).tolist()
    task = LanguageModel(lambda params, x: params["embed"][x] @ params["out"])

    def start(seed):
        keys = jax.random.split(jax.random.key(seed))
        return {
            "embed": jax.random.normal(keys[0], (7, 4)),
            "out": jax.random.normal(keys[1], (4, 7)),
        }

    recipe = train.Recipe(12, 4, 0.02, train.AdamW(root=1e-8))
    training = train.Training(task, recipe, sequences(tokens), start)
    held_out = RNG.integers(0, 7, (2, 6)).tolist()
    asked = likelihoods(task, sequences(held_out, ["a", "b"]))
    words = tokens, dict(zip(asked, held_out, strict=True))
    params = training(np.ones(12), 0)
    return Subject(training, 0, params, asked, words, batch=6)


# What differs by a setting alone is compiled again for nothing.
KINDS = [
    x for x in METHODS if "," not in x or x in ("logra, leading", "trak, 5 models")
]


@pytest.mark.parametrize("name", KINDS)
def test_a_method_scores_every_sequence_for_every_measurement(name):
    subject = language()
    try:
        found = METHODS[name].score(subject)
    except ValueError as error:
        # Series without a step size to suit may diverge, and say so.
        assert name in ("astra", "lissa")
        assert "diverged" in str(error)  # noqa: PT017
        return
    assert found.dims == ("query", "train")
    np.testing.assert_array_equal(found["query"], list(subject.measurements))
    np.testing.assert_array_equal(found["train"], subject.training.examples.ids)
    assert np.isfinite(found).all()
    assert found.values.std() > 0


def test_following_training_is_exact_where_the_loss_is_quadratic():
    x = RNG.normal(size=(20, 4))
    y = x @ RNG.normal(size=4)
    points = labelled(x, y + 0.1 * RNG.normal(size=20))
    task = Regression(lambda params, x: (x @ params["w"])[:, 0])
    recipe = train.Recipe(60, 20, 0.1, train.SGD(), warmup=0, last=1.0)
    training = train.Training(
        task, recipe, points, lambda seed: {"w": jnp.zeros((4, 1))}
    )
    held_out = labelled(RNG.normal(size=(3, 4)), RNG.normal(size=3), list("abc"))
    asked = likelihoods(task, held_out)
    subject = Subject(training, 0, training(np.ones(20), 0), asked, batch=20)
    known = metagradients(training, 0, asked)
    for method in (unrolled, exact):
        found = method(subject)
        for name in asked:
            pair = np.corrcoef(found.sel(query=name), known.sel(query=name))
            # Gradients at the end stand for those on the way.
            assert pair[0, 1] > 0.9
    close = unrolled(subject)
    slope = float((close * known).sum() / (known**2).sum())
    assert slope == pytest.approx(1, abs=0.25)
