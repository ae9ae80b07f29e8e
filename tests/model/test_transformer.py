"""One decoder, told apart by facts: each fact does what it says, exactly."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import primitives as p

from influence.model import jaxprs
from influence.model.adapters import merged
from influence.model.check import check_taps
from influence.model.config import Adapter, Config, Rotary
from influence.model.coverage import layers
from influence.model.examples import sequences
from influence.model.positions import places, view
from influence.model.task import LanguageModel
from influence.model.trace import trace
from influence.model.transformer import Apply, Decoder, attend, shapes
from influence.types import named_leaves, with_leaves
from tests import cases

V, T = 11, 9
SIZES: dict[str, Any] = {
    "vocabulary": V,
    "context": 12,
    "width": 8,
    "hidden": 12,
    "heads": 4,
}
LORA = (Adapter("attention.query", 2, 0.5), Adapter("mlp.down", 3, 2.0))

CONFIGS = {
    "llama": Config(**SIZES, blocks=2),
    "llama 3": Config(
        **SIZES, blocks=2, groups=2, rotary=Rotary(5e5, 0, 8.0, 1.0, 4.0, 4), tied=True
    ),
    "gpt2": Config(
        **SIZES,
        blocks=2,
        rotary=None,
        attention_bias=True,
        out_bias=True,
        gated=False,
        activation="gelu_tanh",
        mlp_bias=True,
        centred=True,
        tied=True,
    ),
    "neox": Config(
        **SIZES,
        blocks=2,
        features=8,
        rotary=Rotary(features=2),
        attention_bias=True,
        out_bias=True,
        gated=False,
        activation="gelu",
        mlp_bias=True,
        centred=True,
        parallel=True,
    ),
    "qwen": Config(
        **SIZES,
        blocks=3,
        groups=1,
        window=3,
        local=(False, True, True),
        query_norm=True,
    ),
    "gemma": Config(
        **SIZES,
        blocks=3,
        groups=2,
        features=6,
        window=3,
        local=(True, False, True),
        local_rotary=Rotary(100.0),
        attention_scale=0.3,
        attention_cap=2.0,
        query_norm=True,
        norm_offset=1.0,
        post_norm=True,
        embed_scale=8**0.5,
        tied=True,
        logit_cap=3.0,
    ),
    "olmo": Config(
        **SIZES,
        blocks=2,
        groups=2,
        query_norm=True,
        query_norm_whole=True,
        pre_norm=False,
        post_norm=True,
    ),
    "lora": Config(**SIZES, blocks=2, groups=2, attention_bias=True, adapters=LORA),
    "fused lora": Config(
        **SIZES, blocks=2, groups=2, adapters=(Adapter("attention", 2, 0.5),)
    ),
}
FACTS = pytest.mark.parametrize("name", CONFIGS)
QUICK = ["gpt2", "neox", "gemma", "olmo"]
"""Between them, every fact."""
SOME = pytest.mark.parametrize("name", QUICK)


def parameters(config, dtype=jnp.float64):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), dtype), shapes(config)
    )


def tokens(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, V, shape))


@FACTS
def test_documents_in_one_row_are_as_if_alone(name):
    apply, params = jax.jit(Apply(CONFIGS[name])), parameters(CONFIGS[name])
    row = tokens(1, 11)
    parts = [(0, 4), (4, 5), (5, 11)]
    # What fills up a document stands behind it, where it is not seen.
    filled = [jnp.pad(row[:, i:j], ((0, 0), (0, 6 - j + i))) for i, j in parts]
    alone = apply(params, jnp.concatenate(filled))
    numbers = jnp.asarray([[7] * 4 + [9] + [7] * 6])
    found = apply(params, row, numbers)
    for x, (i, j) in zip(alone, parts, strict=True):
        # Rounding in another order is all that may differ.
        np.testing.assert_allclose(found[0, i:j], x[: j - i], rtol=1e-11)


@SOME
def test_a_scan_over_blocks_is_a_loop_over_them(name):
    config = CONFIGS[name]
    decoder = Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float64)
    nnx.update(decoder, parameters(config))
    ids = tokens(2, T)
    np.testing.assert_allclose(
        nnx.jit(Decoder.__call__)(decoder, ids), nnx.jit(loop)(decoder, ids), rtol=1e-11
    )


def loop(decoder, ids):
    config = decoder.config
    place, _ = places(ids, None)
    x = decoder.embed(ids) * config.embed_scale
    if decoder.positions is not None:
        x = x + decoder.positions(jnp.broadcast_to(place, ids.shape))
    graph, stacked = nnx.split(decoder.blocks)
    for i, which in enumerate(config.view_L):
        block = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], stacked))
        own = view(place, None, *config.views[which], dtype=x.dtype)
        x = block(x, own)
    head = decoder.embed.embedding[...].T if config.tied else decoder.head.kernel[...]
    logits = decoder.norm(x) @ head
    if config.logit_cap is not None:
        logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
    return logits


@SOME
def test_no_position_sees_a_later_one(name):
    params, ids = parameters(CONFIGS[name]), tokens(1, T)
    changed = ids.at[0, 5].set((ids[0, 5] + 1) % V)
    both = jnp.concatenate([ids, changed])
    found, other = jax.jit(Apply(CONFIGS[name]))(params, both)
    assert (found == other)[:5].all()
    assert not (found == other)[5:].all(axis=1).any()


@SOME
def test_remat_changes_nothing(name):
    config = CONFIGS[name]
    params, ids = parameters(config), tokens(2, T)

    def loss(apply, params):
        return (apply(params, ids) ** 2).sum()

    found, expected = (
        jax.jit(jax.grad(loss, 1), static_argnums=0)(Apply(config, remat), params)
        for remat in (True, False)
    )
    for k, x in named_leaves(found).items():
        np.testing.assert_allclose(x, named_leaves(expected)[k], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", cases.thinned(CONFIGS, [*QUICK, "fused lora"]))
def test_every_parameter_is_read_and_read_right(name):
    config = CONFIGS[name]
    task, params = LanguageModel(Apply(config)), parameters(config)
    rows = [x.tolist() for x in tokens(3, T)]
    batch = next(iter(sequences([rows[0], rows[1][:4], rows[2]]).batches(3)))
    found = layers(task, params, batch)
    assert not found.uncovered
    names = {x.name for x in found.layers}
    modules = {x for x in named_leaves(params) if x.endswith((".kernel", ".a", ".b"))}
    assert names == modules | ({"embed.embedding"} if config.tied else set())
    biased = {x.name: x.bias for x in found.layers if x.bias}
    biases = {
        x for x in named_leaves(params) if x.endswith(".bias") and "norm" not in x
    }
    assert set(biased.values()) == biases
    assert all(k.removesuffix("kernel") + "bias" == x for k, x in biased.items())
    check_taps(task, [*found.layers, *found.on_request], params, batch)


@FACTS
@pytest.mark.parametrize("segments", [False, True])
def test_a_single_row_is_read_by_the_program_of_several(name, segments):
    inputs = {"tokens": tokens(1, T), "mask": jnp.ones((1, T), bool)}
    if segments:
        inputs["segments"] = jnp.ones((1, T), int)
    task = LanguageModel(Apply(CONFIGS[name]))
    # Raises if the program of one row, doubled, is not that of two.
    trace(task.outputs, parameters(CONFIGS[name]), inputs)


def test_attention_is_what_its_formula_says():
    config = CONFIGS["gemma"]
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, T, heads, 6)) for heads in (config.heads, 2, 2))
    seen = np.asarray(view(jnp.arange(T)[None], None, 3, None, dtype="float64").seen)
    q_, k_, v_ = (jnp.asarray(x) for x in (q, k, v))
    found = attend(config, q_, k_, v_, jnp.asarray(seen))
    expected = np.zeros(q.shape)
    for b, t, h in np.ndindex(2, T, config.heads):
        group, back = h // 2, range(max(0, t - 2), t + 1)
        scores = [0.3 * q[b, t, h] @ k[b, s, group] for s in back]
        weights = np.exp([2 * np.tanh(x / 2) for x in scores])
        each = [w * v[b, s, group] for w, s in zip(weights, back, strict=True)]
        expected[b, t, h] = sum(each) / weights.sum()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_slow_frequencies_are_stretched_and_fast_ones_are_not():
    rotary = Rotary(5e5, 32, 8.0, 1.0, 4.0, 256)
    plain = 5e5 ** (-np.arange(16) / 16)
    for found, whole in zip(rotary.frequencies(), plain, strict=True):
        turns = 256 / (2 * np.pi / whole)
        share = (turns - 1) / (4 - 1)
        between = (1 - share) * whole / 8 + share * whole
        expected = whole if turns > 4 else whole / 8 if turns < 1 else between
        np.testing.assert_allclose(found, expected, rtol=1e-14)
    linear = Rotary(1e4, 32, 2.0).frequencies()
    np.testing.assert_allclose(linear, Rotary(1e4, 32).frequencies() / 2, rtol=1e-14)


@pytest.mark.parametrize("name", ["lora", "fused lora"])
def test_adapters_merged_are_adapters_beside(name):
    config, params = CONFIGS[name], parameters(CONFIGS[name])
    plain, weights = merged(config, params)
    assert plain == dataclasses.replace(config, adapters=())
    ids = tokens(2, T)
    expected = jax.jit(Apply(config))(params, ids)
    found = jax.jit(Apply(plain))(weights, ids)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    off = {k: x * 0 for k, x in named_leaves(params).items() if k.endswith("lora.b")}
    without = jax.jit(Apply(config))(with_leaves(params, off), ids)
    assert jnp.abs(without - expected).max() > 1e-2


@FACTS
def test_sites_are_named(name):
    config = CONFIGS[name]
    params = shapes(config)
    program = jaxprs.flatten(Apply(config), params, tokens(2, T)).closed
    sites: dict[str, list] = {}
    for eqn in jaxprs.equations(program.jaxpr):
        if eqn.primitive is p.name_p:
            shape = jaxprs.aval(eqn.outvars[0]).shape
            sites.setdefault(eqn.params["name"], []).append(shape)
    stream = [(2, T, 8)]
    assert sites.pop("attention_pattern") == [(2, 4, T, T)]
    scales = sites.pop("norm_scale")
    assert {x[-1] for x in scales} == {1}
    norms = [x for x in named_leaves(params) if x.endswith("norm.scale")]
    assert len(scales) == len(norms)
    heads = config.heads * config.features
    assert sites.pop("attention_heads") == [(2, T, heads)]
    names = ("resid", "attention_out", "resid_mid", "mlp_in", "mlp_out", "resid_final")
    assert sites == dict.fromkeys(names, stream)


def test_half_precision_is_close_and_is_half():
    config = CONFIGS["gemma"]
    params = parameters(config, jnp.float32)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ids = tokens(2, T)
    found, expected = (jax.jit(Apply(config))(x, ids) for x in (half, params))
    assert found.dtype == jnp.bfloat16
    # Each of some dozens of roundings in a row is of 0.2 %; they add up at random.
    error = jnp.linalg.norm(found.astype(jnp.float32) - expected)
    assert error < 0.03 * jnp.linalg.norm(expected)


def test_equal_configs_are_equal_models():
    config = CONFIGS["gemma"]
    again = dataclasses.replace(config)
    assert Apply(config) == Apply(again)
    assert hash(Apply(config)) == hash(Apply(again))
    assert Apply(config) != Apply(config, remat=True)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"groups": 3}, "4 heads do not divide into 3 groups"),
        ({"local": (True, False)}, "look back at None positions"),
        ({"local": (True,), "window": 2}, "2 blocks are described as 1"),
        (
            {"rotary": Rotary(features=3)},
            "3 of a head's 2 features are to turn in pairs",
        ),
        (
            {"rotary": Rotary(features=4)},
            "4 of a head's 2 features are to turn in pairs",
        ),
        ({"activation": "mish"}, "'mish' is no known activation"),
        ({"adapters": (*LORA, *LORA)}, "beside attention.query, mlp.down, attention.q"),
        ({"adapters": (Adapter("mlp.dwon", 2, 1.0),)}, "beside mlp.dwon"),
        ({"adapters": (Adapter("mlp.gate", 2, 1.0),), "gated": False}, "mlp.gate"),
    ],
)
def test_facts_that_do_not_fit_are_refused(facts, said):
    with pytest.raises(ValueError, match=said):
        Config(**SIZES, blocks=2, **facts)


def test_a_row_longer_than_the_context_is_refused():
    config = CONFIGS["llama"]
    with pytest.raises(
        ValueError, match="13 tokens is longer than the model's context"
    ):
        Apply(config)(parameters(config), tokens(1, 13))


def test_what_is_written_to_shapes_stays_with_whoever_asked():
    config = CONFIGS["gpt2"]
    expected = jax.tree.leaves(shapes(config))
    jax.tree.map(
        lambda x: x.set_value(jax.ShapeDtypeStruct((), jnp.int32)),
        shapes(config),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    assert jax.tree.leaves(shapes(config)) == expected
