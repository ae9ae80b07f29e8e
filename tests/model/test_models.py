"""Models of several libraries, as their users write them, are read exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from influence.model.check import check_taps
from influence.model.coverage import layers
from influence.model.task import LanguageModel, Task, draw
from influence.model.trace import trace
from influence.types import Batch, named_leaves
from tests import cases
from tests.model.readings import assert_read, everything, normal

F64 = jnp.float64


@dataclass(frozen=True)
class Classifier(Task):
    """One class an example: inputs are `{"x": ..., "seen": BxT, "label": B}`."""

    apply: Callable[[Any, Any], Any]

    def outputs(self, params, inputs):
        return self.apply(params, inputs)

    def labels(self, inputs):
        return inputs["label"]

    def counts(self, inputs):
        return jnp.ones_like(inputs["label"], bool)

    def loss(self, outputs, labels):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)

    def sample(self, keys_B, outputs):
        return draw(keys_B, outputs)

    def counted(self, inputs):
        return inputs["seen"]

    def check(self, inputs, outputs, ids):
        del inputs, outputs, ids


def batch_of(inputs):
    n = len(inputs["label"])
    return Batch(inputs, np.zeros((n, 2), np.uint32), np.ones(n, bool))


class ResNet(linen.Module):
    """A stem, one residual block with a strided, grouped convolution, and a head."""

    @linen.compact
    def __call__(self, x):
        def conv(features, **options):
            return linen.Conv(features, (3, 3), param_dtype=F64, **options)

        def norm(x):
            with jax.numpy_dtype_promotion("standard"):  # its epsilon is a float32
                return linen.GroupNorm(num_groups=2, param_dtype=F64)(x)

        x = norm(conv(4)(x))
        y = conv(8, strides=2, use_bias=False)(jnp.tanh(x))
        y = conv(8, feature_group_count=2)(jnp.tanh(norm(y)))
        x = y + linen.Conv(8, (1, 1), strides=2, param_dtype=F64)(x)
        return linen.Dense(3, param_dtype=F64)(jnp.tanh(x).mean((1, 2)))


def resnet():
    model, images = ResNet(), normal(3, 8, 8, 3)
    params = cases.randomised(model.init(jax.random.key(0), images)["params"], F64)
    return lambda params, x: model.apply({"params": params}, x), params, images


def test_a_resnet_in_linen():
    apply, params, images = resnet()
    found = {x.name: x for x in assert_read(apply, params, images)}
    assert not trace(apply, params, images).uncovered
    kinds = [x.kind for x in found.values()]
    assert (kinds.count("convolution"), kinds.count("matrix")) == (4, 1)
    assert (kinds.count("scale"), kinds.count("shift")) == (2, 2)
    assert found["Conv_2.kernel"].stack == (2,)
    assert found["Conv_2.kernel"].bias == "Conv_2.bias"


def test_a_classifier_of_images_passes_the_tracer_s_own_check():
    apply, params, images = resnet()
    task = Classifier(lambda params, inputs: apply(params, inputs["x"]))
    label, seen = np.arange(3), np.ones((3, 1), bool)
    batch = batch_of({"x": images, "label": label, "seen": seen})
    check_taps(
        task, everything(trace(task.outputs, params, batch.inputs)), params, batch
    )


class Encoder(nnx.Module):
    """Tokens, learned positions, attention that sees no padding, a pooled head."""

    def __init__(self, rngs):
        dtypes = {"param_dtype": F64, "rngs": rngs}
        self.tokens = nnx.Embed(cases.V, 8, **dtypes)
        self.positions = nnx.Embed(cases.T, 8, **dtypes)
        self.norm = nnx.LayerNorm(8, **dtypes)
        self.attend = nnx.MultiHeadAttention(2, 8, decode=False, **dtypes)
        self.head = nnx.Linear(8, 3, **dtypes)

    def __call__(self, tokens, seen):
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.tokens(tokens) + self.positions(places)
        with jax.numpy_dtype_promotion("standard"):  # the epsilons are float32
            x = x + self.attend(self.norm(x), mask=seen[:, None, None, :])
        pooled = jnp.where(seen[..., None], x, 0).sum(1)
        return self.head(pooled / seen.sum(1, keepdims=True).astype(F64))


def test_an_encoder_with_a_padding_mask_in_nnx():
    model, params = nnx.split(Encoder(nnx.Rngs(0)))
    params = cases.randomised(params, F64)

    def apply(params, inputs):
        return nnx.merge(model, params)(inputs["x"], inputs["seen"])

    seen = np.arange(cases.T) < np.array([[6], [4], [2]])
    tokens = np.arange(3 * cases.T).reshape(3, -1) % cases.V
    inputs = {"x": tokens, "seen": seen, "label": np.arange(3)}
    inputs = jax.tree.map(jnp.asarray, inputs)
    found = {x.name: x for x in assert_read(apply, params, inputs)}
    assert {found[f"{x}.embedding"].kind for x in ("tokens", "positions")} == {
        "embedding"
    }
    reads = {found[f"attend.{x}.kernel"].reads for x in ("query", "key", "value")}
    assert reads == {"attend.query.kernel"}
    check_taps(Classifier(apply), tuple(found.values()), params, batch_of(inputs))


class Tied(nnx.Module):
    """A language model that looks up, recurs, and ends in the table it looked up in."""

    def __init__(self, cell, rngs):
        self.embed = nnx.Embed(cases.V, 8, param_dtype=F64, rngs=rngs)
        self.rnn = nnx.RNN(cell(8, 8, param_dtype=F64, rngs=rngs), rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        zeros = jnp.zeros(x[:, 0].shape, F64)
        pair = isinstance(self.rnn.cell, nnx.LSTMCell)
        out: Any = self.rnn(x, initial_carry=(zeros, zeros) if pair else zeros)
        return self.embed.attend(x + out)


@pytest.mark.parametrize(
    "cell", cases.thinned([nnx.GRUCell, nnx.LSTMCell], [nnx.GRUCell])
)
def test_a_tied_recurrent_model_in_nnx(cell):
    model, params, rest = nnx.split(Tied(cell, nnx.Rngs(0)), nnx.Param, ...)
    params = cases.randomised(params, F64)

    def apply(params, tokens):
        return nnx.merge(model, params, rest)(tokens)

    tokens = jnp.arange(3 * cases.T).reshape(3, -1) % cases.V
    found = {x.name: x for x in assert_read(apply, params, tokens)}
    assert not trace(apply, params, tokens).uncovered
    assert found["embed.embedding"].kind == "matrix"
    assert found["embed.embedding"].outputs == cases.V
    (batch,) = cases.texts(3).batches(3)
    check_taps(LanguageModel(apply), tuple(found.values()), params, batch)


class Tagger(eqx.Module):
    """A lookup, a norm, a convolution over the line, and a perceptron."""

    embed: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    conv: eqx.nn.Conv1d
    mlp: eqx.nn.MLP

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(cases.V, 8, dtype=F64, key=a)
        self.norm = eqx.nn.LayerNorm(8, dtype=F64)
        self.conv = eqx.nn.Conv1d(8, 6, 3, padding=1, dtype=F64, key=b)
        self.mlp = eqx.nn.MLP(6, cases.V, 5, 2, dtype=F64, key=c)

    def __call__(self, tokens):
        x = jax.vmap(self.norm)(jax.vmap(self.embed)(tokens))
        return jax.vmap(self.mlp)(self.conv(x.T).T)


def test_a_model_in_equinox():
    params, static = eqx.partition(Tagger(jax.random.key(0)), eqx.is_inexact_array)
    params = cases.randomised(params, F64)

    def apply(params, tokens):
        return jax.vmap(eqx.combine(params, static))(tokens)

    tokens = jnp.arange(3 * cases.T).reshape(3, -1) % cases.V
    found = {x.name: (x.kind, x.bias) for x in assert_read(apply, params, tokens)}
    assert not trace(apply, params, tokens).uncovered
    assert found == {
        "embed.weight": ("embedding", None),
        "norm.weight": ("scale", None),
        "norm.bias": ("shift", None),
        "conv.weight": ("convolution", "conv.bias"),
        "mlp.layers.0.weight": ("matrix", "mlp.layers.0.bias"),
        "mlp.layers.1.weight": ("matrix", "mlp.layers.1.bias"),
        "mlp.layers.2.weight": ("matrix", "mlp.layers.2.bias"),
    }


def test_the_table_says_of_every_parameter_what_it_is():
    apply, params, images = resnet()
    task = Classifier(lambda params, inputs: apply(params, inputs["x"]))
    inputs = {"x": images, "label": np.arange(3), "seen": np.ones((3, 1), bool)}
    params = {**params, "spare": jnp.ones(3)}
    table = str(layers(task, params, batch_of(inputs))).split("\n\n")
    usual, asked, missing = (part.splitlines() for part in table)
    assert usual[0].split()[:4] == ["layer", "kind", "I", "O"]
    assert usual[1].split() == [
        "Conv_0.kernel",
        "convolution",
        "27",
        "4",
        "Conv_0.bias",
    ]
    assert asked[1].split() == ["scale:GroupNorm_0.scale", "scale", "1", "4"]
    assert missing[1].split() == ["spare", "3", "not", "used"]
    names = [x for x in named_leaves(params) if str(table).count(x) != 1]
    assert not names
