"""The tracer's check of itself catches what it is there for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.model.check import check_taps
from influence.model.task import LanguageModel
from influence.model.trace import trace
from tests import cases
from tests.model.readings import everything


def checked(apply, params):
    task = LanguageModel(apply)
    (batch,) = cases.texts(3).batches(3)
    layers = everything(trace(task.outputs, params, batch.inputs))
    check_taps(task, layers, params, batch)
    return {x.name: x.kind for x in layers}


def drawn(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(s)) for name, s in shapes.items()}


PARAMS = drawn(embed=(11, 4), w=(4, 5), head=(5, 11))


def body(params, tokens, between):
    return between(params["embed"][tokens] @ params["w"]) @ params["head"]


def test_a_plain_model_passes():
    checked(lambda p, t: body(p, t, jnp.tanh), PARAMS)


def test_batch_statistics_that_mix_examples_are_caught():
    def normalised(x):
        return x - x.mean((0, 1), keepdims=True)

    with pytest.raises(
        ValueError, match="What is read of layer '(embed|w|head)'.*mix examples"
    ):
        checked(lambda p, t: body(p, t, normalised), PARAMS)


def test_positions_merged_before_examples_are_caught():
    def apply(params, tokens):
        x = params["embed"][tokens]
        merged = jnp.swapaxes(x, 0, 1).reshape(-1, x.shape[-1])
        y = (merged @ params["w"]).reshape(x.shape[1], x.shape[0], -1)
        return jnp.tanh(jnp.swapaxes(y, 0, 1)) @ params["head"]

    with pytest.raises(
        ValueError, match="What is read of layer '(embed|w)' is not its gradient"
    ):
        checked(apply, PARAMS)


def many(p, tokens, between=lambda x: x, head=lambda w: w):
    """Uses a weight in every way there is."""
    x = p["embed"][tokens] * p["scale"][None, None]
    x = between(x) + p["shift"][None, None]
    x = jax.lax.conv_general_dilated(
        x, p["kernel"], (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC")
    )
    x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, length=2)[0]
    return x @ head(p["embed"]).T


MANY = drawn(embed=(11, 4), scale=(4,), shift=(4,), kernel=(3, 4, 4), w=(4, 4))
KINDS = {
    "embed": "matrix",
    "scale": "scale",
    "shift": "shift",
    "kernel": "convolution",
    "w": "matrix",
}


def test_every_kind_of_layer_passes():
    assert checked(many, MANY) == KINDS


def test_a_use_without_a_gradient_is_none():
    """A detached use adds nothing to the gradient, and nothing to what is read."""
    stopped = jax.lax.stop_gradient
    found = checked(lambda p, t: many(p, t, head=stopped), MANY)
    assert found == KINDS | {"embed": "embedding"}


def test_a_branch_without_a_gradient_passes():
    checked(lambda p, t: many(p, t, lambda x: x + jax.lax.stop_gradient(x) ** 2), MANY)


@pytest.mark.parametrize("name", ["embed", "scale"])
def test_mixed_examples_are_caught_in_layers_of_any_kind(name):
    def apply(p, tokens):
        rest = jax.lax.stop_gradient({k: v for k, v in p.items() if k != name})
        return many({**rest, name: p[name]}, tokens, lambda x: x * x.mean((0, 1)) ** 2)

    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(
            ValueError, match=f"What is read of layer '{name}'.*mix examples"
        ),
    ):
        checked(apply, MANY)


def test_a_weight_also_used_in_a_derivative_rule_of_its_own_is_no_layer():
    """The rule may keep back its gradient: a product elsewhere would be half of it."""

    @jax.custom_vjp
    def forgets(x, w):
        return x @ w

    forgets.defvjp(
        lambda x, w: (x @ w, w),
        lambda w, g: (g @ w.T, jnp.zeros_like(w)),
    )

    def apply(p, x):
        return forgets(x, p["w"]) + x @ p["w"]

    (uncovered,) = trace(apply, {"w": PARAMS["w"]}, jnp.ones((2, 3, 4))).uncovered
    assert "only partly a layer" in uncovered.reason
    assert "derivative rule of its own" in uncovered.reason


def test_dropout_left_on_is_caught():
    def dropped(x):
        return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x, 0)

    with pytest.raises(ValueError, match=r"random numbers.*Turn dropout off"):
        checked(lambda p, t: many(p, t, dropped), MANY)
