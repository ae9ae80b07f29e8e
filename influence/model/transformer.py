"""Decoder-only transformers in Flax NNX: one model, told apart by a `Config` of facts.

GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma and OLMo differ in where they norm, how
they know positions, what a block may look back at, and in a few numbers. A `Config`
says these facts; the names of families are in `influence.runtime.families`. Blocks are
stacked along a leading axis and walked by a scan, so that a parameter of all blocks is
one array and compiling takes as long as one block.

*Sites* are values named with `jax.ad_checkpoint.checkpoint_name`, in every block:

| site | what it is |
|---|---|
| `resid` | the residual stream at the block's entrance, `[B, T, D]` |
| `resid_mid` | with the attention's output added |
| `attention_pattern` | the weights of what each head looks back at, `[B, H, T, T]` |
| `attention_heads` | what all heads gather, `[B, T, H K]` |
| `attention_out` | what attention adds to the residual stream, `[B, T, D]` |
| `mlp_in`, `mlp_out` | what the MLP reads; what it adds to the residual stream |
| `norm_scale` | of each norm, `1 / √(mean square + ε)`, `[..., 1]` |

and, once, `resid_final`: the residual stream after the last block.

Letters: `D` width, `F` hidden width of the MLP, `H` heads, `G` groups of heads that
share a key and a value, `K` features of a head, `L` blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from influence.linalg.contract import contract, wide
from influence.model.config import ACTIVATIONS, FUSED, Adapter, Config
from influence.model.positions import View, numbered, places, rotate, view
from influence.types import Params


def flat(f: Callable[[Array], Array], x: Array) -> Array:
    """Applies a function of rows to the last axis of `x`, all other axes merged.

    A matrix product gives the same numbers over several axes; a training step of a
    small model is a sixth faster for it on a CPU, whose compiler transposes less on the
    way back.
    """
    return f(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class Embed(nnx.Module):
    """A table of vectors. Flax's own would cast them to the type they began with."""

    def __init__(self, rows: int, width: int, *, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        self.embedding = nnx.Param(init(rngs.params(), (rows, width), dtype))

    def __call__(self, ids_BxT: Array) -> Array:
        """Returns the vector of each id; NaN where the table has none."""
        return jnp.take(self.embedding[...], ids_BxT, axis=0)


class LoRA(nnx.Module):
    """A product of two narrow matrices, `scale (x A) B`."""

    def __init__(
        self, inputs: int, outputs: int, adapter: Adapter, dtype: Any, rngs: nnx.Rngs
    ):
        init = nnx.initializers.lecun_normal()
        self.scale = adapter.scale
        self.a = nnx.Param(init(rngs.params(), (inputs, adapter.rank), dtype))
        self.b = nnx.Param(jnp.zeros((adapter.rank, outputs), dtype))

    def __call__(self, x_NxI: Array) -> Array:
        """Returns what it adds to a layer's output."""
        return self.scale * ((x_NxI @ self.a[...]) @ self.b[...])


class Linear(nnx.Module):
    """A linear layer, with a bias or not, with an adapter beside it or not."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        adapter: Adapter | None = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
        self.lora = LoRA(inputs, outputs, adapter, dtype, rngs) if adapter else None

    def __call__(self, x: Array) -> Array:
        """Returns `x W + b`, and what the adapter adds to it."""
        return flat(self.rows, x)

    def rows(self, x_NxI: Array) -> Array:
        """Returns the same of rows."""
        y = x_NxI @ self.kernel[...]
        if self.bias is not None:
            y = y + self.bias[...][None]
        return y if self.lora is None else y + self.lora(x_NxI)


class Norm(nnx.Module):
    """Brings vectors to one length, computed in float32 at least."""

    def __init__(self, config: Config, size: int, dtype: Any):
        self.config = config
        self.scale = nnx.Param(jnp.full(size, 1 - config.norm_offset, dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype)) if config.centred else None

    def __call__(self, x: Array) -> Array:
        """Returns `x / √(mean x² + ε) * scale`, its mean taken off before or not."""
        y, unit = x.astype(wide(x.dtype)), (*[1] * (x.ndim - 1), -1)
        if self.config.centred:
            y = y - y.mean(-1, keepdims=True)
        square = (y * y).mean(-1, keepdims=True)
        length = jax.lax.rsqrt(square + self.config.norm_epsilon)
        y = y * checkpoint_name(length, "norm_scale")
        scale = self.scale[...].astype(y.dtype) + self.config.norm_offset
        y = y * scale.reshape(unit)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype).reshape(unit)
        return y.astype(x.dtype)


class Attention(nnx.Module):
    """Attention, each group of heads with keys and values of its own."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        def linear(name: str, inputs: int, outputs: int, bias: bool) -> Linear:
            adapter = config.adapter(f"attention.{name}")
            return Linear(
                inputs, outputs, bias=bias, adapter=adapter, dtype=dtype, rngs=rngs
            )

        def norm(size: int) -> Norm | None:
            each = size if config.query_norm_whole else config.features
            return Norm(config, each, dtype) if config.query_norm else None

        width, bias, fused = config.width, config.attention_bias, config.adapter(FUSED)
        queries, keys = (x * config.features for x in (config.heads, config.groups))
        self.config = config
        self.query = linear("query", width, queries, bias)
        self.key = linear("key", width, keys, bias)
        self.value = linear("value", width, keys, bias)
        self.out = linear("out", queries, width, config.out_bias)
        self.query_norm, self.key_norm = norm(queries), norm(keys)
        together = queries + 2 * keys
        self.lora = LoRA(width, together, fused, dtype, rngs) if fused else None

    def __call__(self, x_BxTxD: Array, view: View) -> Array:
        """Returns what each position gathers from those it may look at."""
        q, k, v = self.query(x_BxTxD), self.key(x_BxTxD), self.value(x_BxTxD)
        if self.lora is not None:
            cuts = [q.shape[-1], q.shape[-1] + k.shape[-1]]
            more = jnp.split(flat(self.lora, x_BxTxD), cuts, axis=-1)
            q, k, v = (x + y for x, y in zip((q, k, v), more, strict=True))
        split = (*x_BxTxD.shape[:2], -1, self.config.features)
        q, k = self._normed(self.query_norm, q), self._normed(self.key_norm, k)
        q, k, v = (x.reshape(split) for x in (q, k, v))
        if view.turn is not None:
            q, k = rotate(q, *view.turn), rotate(k, *view.turn)
        y = attend(self.config, q, k, v, view.seen)
        heads = checkpoint_name(y.reshape(*x_BxTxD.shape[:2], -1), "attention_heads")
        return self.out(heads)

    def _normed(self, norm: Norm | None, x: Array) -> Array:
        """Returns queries or keys normed, each head by itself or all of them as one."""
        if norm is None:
            return x
        size = norm.scale.shape[0]
        return norm(x.reshape(*x.shape[:2], -1, size)).reshape(x.shape)


def attend(
    config: Config, q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array, seen: Array
) -> Array:
    """Returns the mean of the values that each head weighs, `[B, T, H, K]`.

    Scores and softmax are in float32 at least. Masked scores are finite: a gradient
    through infinite ones would not be.
    """
    b, t, h, _ = q_BxTxHxK.shape
    q = q_BxTxHxK.reshape(b, t, config.groups, h // config.groups, -1)
    scores = contract("btgnk,bsgk->bgnts", q, k_BxTxGxK) * config.attention_scale
    scores = capped(scores, config.attention_cap).reshape(b, h, t, t)
    scores = jnp.where(seen[:, None], scores, jnp.finfo(scores.dtype).min)
    pattern = jax.nn.softmax(scores, axis=-1).astype(v_BxTxGxK.dtype)
    pattern = checkpoint_name(pattern, "attention_pattern")
    pattern = pattern.reshape(b, config.groups, -1, t, t)
    y = contract("bgnts,bsgk->btgnk", pattern, v_BxTxGxK).astype(pattern.dtype)
    return y.reshape(q_BxTxHxK.shape)


def capped(x: Array, cap: float | None) -> Array:
    """Returns `cap tanh(x / cap)`, or `x` if there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class MLP(nnx.Module):
    """A multilayer perceptron, gated or not."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        def linear(name: str, inputs: int, outputs: int) -> Linear:
            options = {
                "bias": config.mlp_bias,
                "adapter": config.adapter(f"mlp.{name}"),
            }
            return Linear(inputs, outputs, **options, dtype=dtype, rngs=rngs)

        self.activation = config.activation
        gated = config.gated
        self.gate = linear("gate", config.width, config.hidden) if gated else None
        self.up = linear("up", config.width, config.hidden)
        self.down = linear("down", config.hidden, config.width)

    def __call__(self, x_BxTxD: Array) -> Array:
        """Returns what each position makes of itself."""
        f, up = ACTIVATIONS[self.activation], self.up(x_BxTxD)
        return self.down(f(up) if self.gate is None else f(self.gate(x_BxTxD)) * up)


class Block(nnx.Module):
    """Attention and an MLP, each added to the residual stream."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        def norm(present: bool) -> Norm | None:
            return Norm(config, config.width, dtype) if present else None

        self.parallel = config.parallel
        self.attention_norm = norm(config.pre_norm)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.attention_post_norm = norm(config.post_norm)
        self.mlp_norm = norm(config.pre_norm)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = norm(config.post_norm)

    def __call__(self, x_BxTxD: Array, view: View) -> Array:
        """Returns the residual stream after the block."""
        x = checkpoint_name(x_BxTxD, "resid")
        y = self.attention(_through(self.attention_norm, x), view)
        y = checkpoint_name(_through(self.attention_post_norm, y), "attention_out")
        middle = checkpoint_name(x + y, "resid_mid")
        read = _through(self.mlp_norm, x if self.parallel else middle)
        y = self.mlp(checkpoint_name(read, "mlp_in"))
        return middle + checkpoint_name(_through(self.mlp_post_norm, y), "mlp_out")


def _through(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """Token ids in, next-token logits out.

    Args:
      config: what kind of decoder.
      rngs: for its weights.
      dtype: of its weights.
      remat: whether blocks are computed again in the backward pass, not kept.

    Example:
      >>> from flax import nnx
      >>> from influence.model.transformer import Config, Decoder
      >>> config = Config(10, 8, width=16, hidden=24, heads=4, blocks=2, groups=2)
      >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
      >>> decoder(jnp.array([[1, 2, 3]])).shape
      (1, 3, 10)
    """

    def __init__(
        self,
        config: Config,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        remat: bool = False,
    ):
        @nnx.split_rngs(splits=config.blocks)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Block(config, dtype=dtype, rngs=rngs)

        def embed(rows: int) -> Embed:
            return Embed(rows, config.width, dtype=dtype, rngs=rngs)

        self.config, self.remat = config, remat
        self.embed = embed(config.vocabulary)
        self.positions = embed(config.context) if config.rotary is None else None
        self.blocks = stacked(rngs)
        self.norm = Norm(config, config.width, dtype)
        head = partial(Linear, config.width, config.vocabulary, dtype=dtype, rngs=rngs)
        self.head = None if config.tied else head()

    def __call__(self, tokens_BxT: Array, segments_BxT: Array | None = None) -> Array:
        """Returns logits, `[B, T, V]`.

        Args:
          tokens_BxT: token ids.
          segments_BxT: the number of each token's document, where a row holds several
            one after the other; positions begin anew with each, and none sees another.
            A document is a run of equal numbers.

        Raises:
          ValueError: if the rows are longer than the context.
        """
        if tokens_BxT.shape[1] > self.config.context:
            raise ValueError(
                f"A sequence of {tokens_BxT.shape[1]} tokens is longer than the "
                f"model's context of {self.config.context}. Cut sequences to it."
            )
        place, document = places(tokens_BxT, segments_BxT)
        x = self.embed(tokens_BxT) * self.config.embed_scale
        if self.positions is not None:
            own = numbered(tokens_BxT) if document is None else place
            x = x + self.positions(own)
        each = [view(place, document, *y, dtype=x.dtype) for y in self.config.views]
        views = jax.tree.map(lambda *xs: jnp.stack(xs), *each)
        block, params = nnx.split(self.blocks)

        def step(x, layer):
            params, which = layer
            own = jax.tree.map(lambda y: y[which], views)
            return nnx.merge(block, params)(x, own), None

        # A scan's body is not merged with its backward pass: nothing to prevent.
        step = jax.checkpoint(step, prevent_cse=False) if self.remat else step
        x, _ = jax.lax.scan(step, x, (params, jnp.asarray(self.config.view_L)))
        x = self.norm(checkpoint_name(x, "resid_final"))
        if self.head is None:
            logits = flat(lambda x_NxD: x_NxD @ self.embed.embedding[...].T, x)
        else:
            logits = self.head(x)
        return capped(logits, self.config.logit_cap)


@cache
def structure(config: Config, remat: bool = False) -> nnx.GraphDef:
    """Returns a decoder without its parameters."""
    return nnx.split(_abstract(config, jnp.dtype(jnp.float32), remat))[0]


def shapes(config: Config, dtype: Any = jnp.float32) -> Params:
    """Returns the shapes of a decoder's parameters, none of them made."""
    found = nnx.split(_abstract(config, jnp.dtype(dtype), False))[1]
    # In variables of their own: what a caller writes to them stays with the caller.
    return jax.tree.map(lambda x: x, found)


@cache
def _abstract(config: Config, dtype: jnp.dtype, remat: bool) -> Decoder:
    def make() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, remat=remat)

    return nnx.eval_shape(make)


@dataclass(frozen=True)
class Apply:
    """A decoder as a pure function of its parameters.

    Equal for equal configs, so that what was compiled for one serves the other.

    Attributes:
      config: what kind of decoder.
      remat: whether blocks are computed again in the backward pass.

    Example:
      >>> from flax import nnx
      >>> from influence.model.transformer import Apply, Config, Decoder
      >>> config = Config(10, 8, width=16, hidden=24, heads=4, blocks=2)
      >>> weights = nnx.state(Decoder(config, rngs=nnx.Rngs(0)))
      >>> small = influence.LanguageModel(Apply(config), config.context)
      >>> small.outputs(weights, {"tokens": jnp.array([[1, 2, 3]])}).shape
      (1, 3, 10)
    """

    config: Config
    remat: bool = False

    def __call__(
        self, params: Params, tokens_BxT: Array, segments_BxT: Array | None = None
    ) -> Array:
        """Returns logits, `[B, T, V]`."""
        decoder = nnx.merge(structure(self.config, self.remat), params)
        return decoder(tokens_BxT, segments_BxT)
