"""The models of the reference files, and their data, as this engine reads them.

Both are PyTorch models by origin: weights `[O, I]`, one matrix for q, k and v.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import influence
from influence.types import Inputs, Params


@dataclass(frozen=True)
class Counted(influence.Task):
    """A language model whose last position counts too, as kronfluence counts it.

    No gradient leaves that position, so it only dilutes the covariances. Inputs are
    those of `LanguageModel`; the model is handed all of them.
    """

    apply: Any

    @property
    def language(self) -> influence.LanguageModel:
        """Returns the task that differs in nothing else."""
        return influence.LanguageModel(self.apply)

    def outputs(self, params: Params, inputs: Inputs) -> Array:
        """Returns logits, `[B, T, V]`."""
        return self.apply(params, inputs)

    def labels(self, inputs: Inputs) -> Array:
        """Returns the next tokens."""
        return self.language.labels(inputs)

    def counts(self, inputs: Inputs) -> Array:
        """Returns whether the next token counts."""
        return self.language.counts(inputs)

    def loss(self, outputs: Array, labels: Array) -> Array:
        """Returns `-log p(next token)`."""
        return self.language.loss(outputs, labels)

    def sample(self, keys_B: Array, outputs: Array) -> Array:
        """Returns next tokens from the softmax."""
        return self.language.sample(keys_B, outputs)

    def counted(self, inputs: Inputs) -> Array:
        """Returns every position that is not padding."""
        return jnp.asarray(inputs["counts"])

    def check(self, inputs: Inputs, outputs: Any, ids: Sequence[str]) -> None:
        """Raises for token ids outside the vocabulary."""
        self.language.check(inputs, outputs, ids)


def linear(params: Params, name: str, x: Array) -> Array:
    """Returns a PyTorch linear layer's output, from its weight `[O, I]` and bias."""
    y = x @ params[f"{name}.weight"].T
    bias = params.get(f"{name}.bias")
    return y if bias is None else y + bias[None, None]


def norm(params: Params, name: str, x: Array) -> Array:
    """Returns a PyTorch layer norm's output."""
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * params[f"{name}.weight"][None, None] + params[f"{name}.bias"][None, None]


def attend(q: Array, k: Array, v: Array, seen: Array, heads: int) -> Array:
    """Returns causal attention over positions that are `seen`, `[B, T]`.

    The first half of positions is not shown the second, which it could not look at.
    """
    split = (*q.shape[:2], heads, -1)
    q, k, v = (x.reshape(split) for x in (q * (q.shape[-1] // heads) ** -0.5, k, v))
    half = q.shape[1] // 2
    first = gathered(q[:, :half], k[:, :half], v[:, :half], seen[:, :half])
    second = gathered(q[:, half:], k, v, seen)
    return jnp.concatenate([first, second], axis=1).reshape(*q.shape[:2], -1)


def gathered(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """Returns what the last positions gather from all, `[B, T, H, K]`.

    Divided by the sum of weights at the end, where there is the least to divide.
    """
    queries, keys = q.shape[1], k.shape[1]
    causal = jnp.tril(jnp.ones((queries, keys), bool), keys - queries)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    scores = jnp.where(causal[None, None] & seen[:, None, None], scores, -1e9)
    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    y = jnp.einsum("bhqk,bkhd->bhqd", weights, v)
    return (y / weights.sum(-1, keepdims=True)).swapaxes(1, 2)


def tiny(params: Params, inputs: Inputs) -> Array:
    """The tiny model: one block, its head tied to the embedding."""
    tokens, seen = inputs["tokens"], inputs["counts"]
    x = params["emb.weight"][tokens] + params["pos.weight"][: tokens.shape[1]][None]
    h = norm(params, "l1", x)
    q, k, v = (linear(params, f"attn.{name}", h) for name in "qkv")
    x = x + linear(params, "attn.o", attend(q, k, v, seen, heads=1))
    up = jax.nn.gelu(linear(params, "up", x), approximate=False)
    return (x + linear(params, "down", up)) @ params["emb.weight"].T


@dataclass(frozen=True)
class GPT:
    """A decoder with blocks as in GPT-2, one matrix for q, k and v."""

    blocks: int
    heads: int

    def __call__(self, params: Params, inputs: Inputs) -> Array:
        """Returns logits, `[B, T, V]`."""
        tokens, seen = inputs["tokens"], inputs["counts"]
        position = params["pos_emb.weight"][: tokens.shape[1]][None]
        x = params["tok_emb.weight"][tokens] + position
        for i in range(self.blocks):
            block = f"blocks.{i}"
            qkv = linear(params, f"{block}.attn.qkv", norm(params, f"{block}.ln1", x))
            y = attend(*jnp.split(qkv, 3, axis=-1), seen, heads=self.heads)
            x = x + linear(params, f"{block}.attn.proj", y)
            up = linear(params, f"{block}.mlp.fc1", norm(params, f"{block}.ln2", x))
            x = x + linear(params, f"{block}.mlp.fc2", jax.nn.gelu(up))
        return linear(params, "lm_head", norm(params, "ln_f", x))


small = GPT(blocks=4, heads=4)
"""The reference model."""


def examples(ids: np.ndarray, mask: np.ndarray, kind: str) -> influence.Examples:
    """Returns token ids with their padding mask as named examples."""
    inputs = {"tokens": ids.astype(np.int32), "counts": mask.astype(bool)}
    return influence.Examples(inputs, tuple(f"{kind} {i}" for i in range(len(ids))))
