"""Continuations are the model's own, one token after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.model.config import Config
from influence.model.generate import generate
from influence.model.transformer import Apply
from tests.model.test_transformer import parameters

CONFIG = Config(11, 16, width=8, hidden=12, heads=2, blocks=2)
APPLY, PROMPTS = Apply(CONFIG), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def params():
    return parameters(CONFIG)


def greedy(params, prompt, length):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(jax.jit(APPLY)(params, jnp.asarray([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_each_token_is_the_likeliest_after_those_before_it(params):
    found = generate(APPLY, params, PROMPTS, 3)
    assert found == [greedy(params, x, 3) for x in PROMPTS]


def test_a_sequence_ends_with_its_stop_token(params):
    whole = generate(APPLY, params, PROMPTS, 6)
    stop = whole[0][2]
    found = generate(APPLY, params, PROMPTS, 6, stop=stop)
    for x, y in zip(found, whole, strict=True):
        assert x == (y[: y.index(stop) + 1] if stop in y else y)


def test_draws_hang_on_the_key_and_follow_the_model(params):
    key, many = jax.random.key(0), [[1, 2, 3]] * 4000
    found = generate(APPLY, params, many, 1, temperature=2.0, key=key)
    assert found == generate(APPLY, params, many, 1, temperature=2.0, key=key)
    share = np.bincount(np.ravel(found), minlength=11) / len(many)
    logits = APPLY(params, jnp.asarray([[1, 2, 3]]))[0, -1]
    # Four standard deviations of a share of 4000 draws are at most 0.032.
    np.testing.assert_allclose(share, jax.nn.softmax(logits / 2), atol=0.032)


def test_what_can_not_be_continued_is_refused(params):
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(APPLY, params, [[1], []], 3)
    with pytest.raises(ValueError, match=r"temperature 0\.5 without a key"):
        generate(APPLY, params, [[1]], 3, temperature=0.5)
    with pytest.raises(ValueError, match="longer than the model's context of 16"):
        generate(APPLY, params, [[1]], 16)
