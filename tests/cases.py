"""The table the laws are tested on: one tiny decoder, written in many ways.

Each case is a two-block decoder with attention, a gated product or not, with or without
biases, as a raw function, in Flax NNX or in Flax Linen, its blocks in a Python loop or
under a scan, rematerialised or not. They differ in nothing a law may depend on.
"""

from collections.abc import Callable, Collection, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import Array

from influence.model.examples import Examples, sequences
from influence.model.task import LanguageModel
from influence.types import Params

V, T, D, F, H, BLOCKS = 11, 6, 8, 12, 2, 2
MATRICES = ("q", "k", "v", "o", "up", "down")


class Case(NamedTuple):
    """A model, its parameters and some data."""

    task: LanguageModel
    params: Params
    examples: Examples


def case(make: Callable, bias: bool, dtype: Any = jnp.float64) -> Case:
    """Returns a model made by one of the makers below, with random weights.

    A maker returns the same function every time it is asked for the same: what was
    compiled for it serves all of a module's tests.
    """
    apply, params = make(bias, dtype=dtype)
    return Case(LanguageModel(apply), randomised(params, dtype), texts(7))


def thinned(cases: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Returns the cases of a test, those that are not always run marked as slow.

    For laws that take seconds a case: all of them are what `pytest -m slow` adds.
    """
    slow = pytest.mark.slow
    return [
        x
        if x in always
        else pytest.param(*(x if isinstance(x, tuple) else [x]), marks=slow)
        for x in cases
    ]


def texts(n: int, seed: int = 0) -> Examples:
    """Returns `n` random sequences of two to `T` tokens."""
    rng = np.random.default_rng(seed)
    lengths = [T, *rng.integers(2, T + 1, n - 1)]
    tokens = [rng.integers(0, V, length).tolist() for length in lengths]
    return sequences(tokens, [f"text-{seed}-{i}" for i in range(n)])


def normal(seed: int, shape: tuple[int, ...]) -> Array:
    """Returns random numbers, for which JAX would compile a program of every shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def randomised(params: Params, dtype: Any) -> Params:
    """Returns parameters of these shapes drawn anew, none of them zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), dtype), params
    )


def attend(q: Array, k: Array, v: Array) -> Array:
    """Returns causal attention over `[B, T, D]` in `H` heads."""
    split = (*q.shape[:2], H, D // H)
    q, k, v = (x.reshape(split) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (D // H) ** 0.5
    causal = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], D)


@cache
def raw(
    bias: bool, scan: bool, dtype: Any, remat: bool = False
) -> tuple[Callable, Params]:
    """Returns a plain function of a dictionary, and the shapes of its arrays."""
    shapes = {
        "q": (D, D),
        "k": (D, D),
        "v": (D, D),
        "o": (D, D),
        "up": (D, F),
        "down": (F, D),
    }
    stack = (BLOCKS,) if scan else ()
    like = partial(jax.ShapeDtypeStruct, dtype=dtype)
    block = {
        k: {"w": like((*stack, *s))} | ({"b": like((*stack, s[1]))} if bias else {})
        for k, s in shapes.items()
    }
    block |= {"scale": like((*stack, D))}
    blocks = block if scan else [block] * BLOCKS

    def dense(p: dict, x: Array) -> Array:
        y = x @ p["w"]
        return y + p["b"][None, None] if bias else y

    @jax.jit
    def step(x: Array, p: dict) -> Array:
        h = jnp.tanh(x) * p["scale"][None, None]
        x = x + dense(p["o"], attend(*(dense(p[k], h) for k in "qkv")))
        return x + dense(p["down"], jax.nn.gelu(dense(p["up"], x)))

    run = jax.checkpoint(step) if remat else step

    def apply(params: Params, tokens: Array) -> Array:
        x = params["embed"][tokens]
        if scan:
            x, _ = jax.lax.scan(lambda x, p: (run(x, p), None), x, params["blocks"])
        else:
            for p in params["blocks"]:
                x = run(x, p)
        return x @ params["head"]

    return apply, {
        "embed": like((V, D)),
        "blocks": blocks,
        "head": like((D, V)),
    }


class NNXBlock(nnx.Module):
    """A block in Flax NNX."""

    def __init__(self, bias: bool, dtype: Any, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=bias, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.RMSNorm(D, param_dtype=dtype, rngs=rngs)
        self.q, self.k, self.v = linear(D, D), linear(D, D), linear(D, D)
        self.o, self.up, self.down = linear(D, D), linear(D, F), linear(F, D)

    def __call__(self, x: Array) -> Array:
        """Returns the residual stream after the block."""
        with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote float64
            h = self.norm(x)
        x = x + self.o(attend(self.q(h), self.k(h), self.v(h)))
        return x + self.down(jax.nn.gelu(self.up(x)))


class NNXDecoder(nnx.Module):
    """A decoder in Flax NNX, its blocks in a loop or under a scan."""

    def __init__(self, bias: bool, scan: bool, dtype: Any, rngs: nnx.Rngs):
        self.embed = nnx.Embed(V, D, param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(D, V, use_bias=False, param_dtype=dtype, rngs=rngs)
        if scan:

            @nnx.split_rngs(splits=BLOCKS)
            @nnx.vmap(in_axes=0, out_axes=0)
            def stacked(rngs):
                return NNXBlock(bias, dtype, rngs)

            self.blocks = stacked(rngs)
        else:
            self.loop = nnx.List([NNXBlock(bias, dtype, rngs) for _ in range(BLOCKS)])
        self.scan = scan

    def __call__(self, tokens: Array) -> Array:
        """Returns logits."""
        x = self.embed(tokens)
        if self.scan:
            block, params = nnx.split(self.blocks)
            x, _ = jax.lax.scan(lambda x, p: (nnx.merge(block, p)(x), None), x, params)
        else:
            for block in self.loop:
                x = block(x)
        return self.head(x)


@cache
def in_nnx(bias: bool, scan: bool, dtype: Any) -> tuple[Callable, Params]:
    """Returns a Flax NNX model as a function of its state, and the state's shapes."""
    model, params = nnx.split(
        nnx.eval_shape(lambda: NNXDecoder(bias, scan, dtype, nnx.Rngs(0)))
    )
    return lambda params, tokens: nnx.merge(model, params)(tokens), params


class LinenBlock(linen.Module):
    """A block in Flax Linen."""

    bias: bool
    dtype: Any

    @linen.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        """Returns the residual stream after the block, as a scan's carry."""
        dense = partial(linen.Dense, use_bias=self.bias, param_dtype=self.dtype)
        with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote float64
            h = linen.RMSNorm(param_dtype=self.dtype, name="norm")(x)
        q, k, v = (dense(D, name=name)(h) for name in "qkv")
        x = x + dense(D, name="o")(attend(q, k, v))
        return x + dense(D, name="down")(jax.nn.gelu(dense(F, name="up")(x))), None


class LinenDecoder(linen.Module):
    """A decoder in Flax Linen, its blocks in a loop or under a scan."""

    bias: bool
    scan: bool
    dtype: Any

    @linen.compact
    def __call__(self, tokens: Array) -> Array:
        """Returns logits."""
        x = linen.Embed(V, D, param_dtype=self.dtype, name="embed")(tokens)
        if self.scan:
            stack = linen.scan(
                LinenBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=BLOCKS,
            )
            x, _ = stack(self.bias, self.dtype, name="blocks")(x, None)
        else:
            for i in range(BLOCKS):
                x, _ = LinenBlock(self.bias, self.dtype, name=f"blocks_{i}")(x, None)
        return linen.Dense(V, use_bias=False, param_dtype=self.dtype, name="head")(x)


@cache
def in_linen(bias: bool, scan: bool, dtype: Any) -> tuple[Callable, Params]:
    """Returns a Flax Linen model as a function of its parameters, and their shapes."""
    model = LinenDecoder(bias, scan, dtype)
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return lambda params, tokens: model.apply({"params": params}, tokens), params


MAKERS = {
    "raw-loop": partial(raw, scan=False),
    "raw-scan": partial(raw, scan=True),
    "raw-loop-remat": partial(raw, scan=False, remat=True),
    "raw-scan-remat": partial(raw, scan=True, remat=True),
    "nnx-loop": partial(in_nnx, scan=False),
    "nnx-scan": partial(in_nnx, scan=True),
    "linen-loop": partial(in_linen, scan=False),
    "linen-scan": partial(in_linen, scan=True),
}

ALL = [(name, bias) for name in MAKERS for bias in (False, True)]
IDS = [f"{name}-{'bias' if bias else 'plain'}" for name, bias in ALL]
