"""The k largest of many numbers, of each row or of all.

XLA sorts, and on CPUs its `top_k` takes longer than the matrix products around it. A
threshold that `k` numbers reach is found in a few counting passes instead, each a sum,
which an array spread over devices needs little communication for.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


def keep_largest(x: Array, k: int) -> Array:
    """Returns non-negative numbers with all but each row's k largest set to zero.

    Equal ones at the edge are all kept. A gradient flows through those that are.

    Args:
      x: rows along the last axis.
      k: how many of each.
    """
    if k >= x.shape[-1]:
        return x
    rows = jax.lax.stop_gradient(x).reshape(-1, x.shape[-1])
    return jnp.where(x >= edge_of_rows(rows, k).reshape(*x.shape[:-1], 1), x, 0)


def keep_largest_of_all(x: Array, k: int) -> Array:
    """Returns non-negative numbers with all but the k largest set to zero.

    Equal ones at the edge are all kept. A gradient flows through those that are.

    Args:
      x: a matrix.
      k: how many.
    """
    if k >= x.size:
        return x
    return jnp.where(x >= edge_of_largest(jax.lax.stop_gradient(x), k), x, 0)


def edge_of_rows(x_NxF: Array, k: int) -> Array:
    """Returns numbers that exactly `k` of each row reach, or as few as ties allow.

    Args:
      x_NxF: float32 or float64; none negative or NaN.
      k: from 1 up. The edge is 0 if fewer are positive.

    Returns:
      A number for each row, `[N]`.
    """
    x_FxN = x_NxF.T  # counted along the first axis: the compiler keeps vectors that way
    return _edge(
        k, x_FxN.max(0), lambda edge: (x_FxN >= edge[None]).sum(0, dtype=jnp.int32)
    )


def edge_of_largest(x: Array, k: int) -> Array:
    """Returns a number that exactly `k` of a matrix reach, or as few as ties allow.

    Args:
      x: float32 or float64; none negative or NaN.
      k: from 1 up. The edge is 0 if fewer are positive.
    """

    def count(edge: Array) -> Array:
        # Along the first axis first, as above.
        return (x >= edge).sum(0, dtype=jnp.int32).sum(dtype=jnp.int32)

    return _edge(k, x.max(), count)


class _Bracket(NamedTuple):
    """Thresholds that at least `k` numbers reach, and fewer do."""

    low: Array
    at_low: Array
    high: Array
    at_high: Array
    step: Array


def _edge(k: int, largest: Array, count: Callable[[Array], Array]) -> Array:
    """Returns thresholds that `k` numbers reach: one, or one for each of many rows.

    Interpolates the logarithm of the count, which falls about linearly with the
    threshold, and bisects in every third step, so that it always ends.

    Args:
      k: how many.
      largest: the largest number, of all or of each row.
      count: returns how many numbers reach a threshold.
    """
    kind = largest.dtype
    tiny = jnp.full_like(largest, jnp.finfo(kind).tiny)
    highest = jnp.nextafter(largest, jnp.full_like(largest, jnp.inf))

    def apart(now: _Bracket) -> Array:
        wide = (now.at_low > k) & (jnp.nextafter(now.low, now.high) < now.high)
        return wide.any()

    def narrower(now: _Bracket) -> _Bracket:
        many, few, wanted = (
            jnp.log(jnp.asarray(y, kind) + 0.5) for y in (now.at_low, now.at_high, k)
        )
        share = jnp.where(now.step % 3 == 2, 0.5, (many - wanted) / (many - few))
        tried = now.low + share.astype(kind) * (now.high - now.low)
        # Numbers of any size lie between 0 and the least that is not: bits halve that.
        tried = jnp.where(now.step % 9 == 8, _halfway(now.low, now.high), tried)
        inside = (tried > now.low) & (tried < now.high)
        tried = jnp.where(inside, tried, _halfway(now.low, now.high))
        here = count(tried)
        enough = here >= k
        return _Bracket(
            jnp.where(enough, tried, now.low),
            jnp.where(enough, here, now.at_low),
            jnp.where(enough, now.high, tried),
            jnp.where(enough, now.at_high, here),
            now.step + 1,
        )

    none = jnp.zeros(largest.shape, jnp.int32)
    begun = _Bracket(tiny, count(tiny), highest, none, jnp.zeros((), jnp.int32))
    found = jax.lax.while_loop(apart, narrower, begun)
    return jnp.where(begun.at_low < k, 0, found.low)


def _halfway(low: Array, high: Array) -> Array:
    """Returns the number in the middle between two, as bits count them."""
    kind = jnp.int64 if low.dtype == jnp.float64 else jnp.int32
    a, b = (jax.lax.bitcast_convert_type(y, kind) for y in (low, high))
    return jax.lax.bitcast_convert_type(a + (b - a) // 2, low.dtype)
