"""Where tokens are: what a block is told of it, and how it turns queries and keys.

A row may hold several documents, one after the other; positions begin anew with each,
and no position sees another document's. Letters as in `influence.model.config`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from influence.linalg.contract import wide
from influence.model.config import Rotary


class View(NamedTuple):
    """What a block is told of its positions.

    Attributes:
      seen: which position (last axis) each position may look at, `[B or 1, T, T]`.
      turn: sine and cosine of each position's angles, `[B or 1, T, 1, features / 2]`;
        None where positions are learned.
    """

    seen: Array
    turn: tuple[Array, Array] | None


def places(tokens: Array, segments: Array | None) -> tuple[Array, Array | None]:
    """Returns each token's position in its document, and the document's number.

    Both `[B, T]`; where a row is one document, `[1, T]` and None.
    """
    if segments is None:
        return jnp.arange(tokens.shape[1])[None], None
    index = numbered(tokens)
    new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(new, index, 0), axis=1)
    return index - start, jnp.cumsum(new, axis=1)


def numbered(tokens: Array) -> Array:
    """Returns every row's positions, `[B, T]`.

    Of one row the same program as of several: to broadcast a single row is none.
    """
    return jax.lax.broadcasted_iota(jnp.result_type(int), tokens.shape, 1)


def view(
    place: Array,
    document: Array | None,
    window: int | None,
    rotary: Rotary | None,
    *,
    dtype: Any,
) -> View:
    """Returns what blocks with a window and a rotation are told of positions."""
    index = jnp.arange(place.shape[1])
    back = (index[:, None] - index[None])[None]
    seen = back >= 0
    if window is not None:
        seen = seen & (back < window)
    if document is not None:
        seen = seen & (document[:, :, None] == document[:, None, :])
    if rotary is None:
        return View(seen, None)
    kind = wide(dtype)
    frequency = jnp.asarray(rotary.frequencies(), kind)[None, None, None]
    angle = place.astype(kind)[:, :, None, None] * frequency
    return View(seen, (jnp.sin(angle), jnp.cos(angle)))


def rotate(x_BxTxHxK: Array, sin: Array, cos: Array) -> Array:
    """Turns the first features of each head, pair by pair, by their position's angles.

    The first half of the turned features is paired with the second.
    """
    half = sin.shape[-1]
    a, b, rest = jnp.split(x_BxTxHxK, [half, 2 * half], axis=-1)
    sin, cos = sin.astype(a.dtype), cos.astype(a.dtype)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)
