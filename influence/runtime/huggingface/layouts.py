"""How weights lie in a checkpoint, and how they lie here.

A layout cuts one of their tensors into ours and joins ours into theirs, each the
inverse of the other: entries move, none is computed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from influence.model.config import Config


class Layout(NamedTuple):
    """Two ways between their tensor and ours.

    Attributes:
      cut: their tensor as ours.
      join: ours as theirs.
    """

    cut: Callable[[Config, Array], tuple[Array, ...]]
    join: Callable[[Config, Sequence[Array]], Array]


AS_IS = Layout(lambda config, x: (x,), lambda config, xs: xs[0])
"""Vectors, tables, and matrices from inputs to outputs."""

TURNED = Layout(lambda config, x: (x.T,), lambda config, xs: xs[0].T)
"""Matrices from outputs to inputs."""


def _cut_columns(config: Config, x: Array) -> tuple[Array, ...]:
    return tuple(jnp.split(x, 3, axis=-1))


COLUMNS = Layout(_cut_columns, lambda config, xs: jnp.concatenate(xs, axis=-1))
"""GPT-2: queries, keys and values side by side, `[D, 3 H K]` or `[3 H K]`."""


def _cut_heads(config: Config, x: Array) -> tuple[Array, ...]:
    x = x.reshape(config.heads, 3, config.features, *x.shape[1:])
    return tuple(x[:, i].reshape(-1, *x.shape[3:]).T for i in range(3))


def _join_heads(config: Config, xs: Sequence[Array]) -> Array:
    turned = [x.T for x in xs]
    split = [x.reshape(config.heads, 1, -1, *x.shape[1:]) for x in turned]
    return jnp.concatenate(split, axis=1).reshape(-1, *turned[0].shape[1:])


HEADS = Layout(_cut_heads, _join_heads)
"""GPT-NeoX: head by head its query, key and value, `[H 3 K, D]` or `[H 3 K]`."""


def _cut_heads_together(config: Config, x: Array) -> tuple[Array, ...]:
    return (jnp.concatenate(_cut_heads(config, x), axis=-1),)


def _join_heads_together(config: Config, xs: Sequence[Array]) -> Array:
    return _join_heads(config, jnp.split(xs[0], 3, axis=-1))


HEADS_TOGETHER = Layout(_cut_heads_together, _join_heads_together)
"""The same as one matrix of ours, first all queries, then all keys, then all values."""
