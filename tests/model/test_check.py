"""The tracer's check of itself catches what it is there for."""

import jax
import jax.numpy as jnp
import pytest

from influence.model.check import check_taps
from influence.model.task import LanguageModel
from influence.model.trace import select, trace
from tests import cases


def checked(apply, params):
    task = LanguageModel(apply)
    (batch,) = cases.texts(3).batches(3)
    layers = select(trace(task.outputs, params, batch.inputs), "*")
    check_taps(task, layers, params, batch)


def drawn(**shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(k, s, jnp.float64)
        for k, (name, s) in zip(keys, shapes.items(), strict=True)
    }


PARAMS = drawn(embed=(11, 4), w=(4, 5), head=(5, 11))


def body(params, tokens, between):
    return between(params["embed"][tokens] @ params["w"]) @ params["head"]


def test_a_plain_model_passes():
    checked(lambda p, t: body(p, t, jnp.tanh), PARAMS)


def test_batch_statistics_that_mix_examples_are_caught():
    def normalised(x):
        return x - x.mean((0, 1), keepdims=True)

    with pytest.raises(
        ValueError, match="What is read of layer '(w|head)'.*mix examples"
    ):
        checked(lambda p, t: body(p, t, normalised), PARAMS)


def test_positions_merged_before_examples_are_caught():
    def apply(params, tokens):
        x = params["embed"][tokens]
        merged = jnp.swapaxes(x, 0, 1).reshape(-1, x.shape[-1])
        y = (merged @ params["w"]).reshape(x.shape[1], x.shape[0], -1)
        return jnp.tanh(jnp.swapaxes(y, 0, 1)) @ params["head"]

    with pytest.raises(
        ValueError, match="What is read of layer 'w' is not its gradient"
    ):
        checked(apply, PARAMS)
