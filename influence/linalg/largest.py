"""The k largest of many numbers, of each row or of all.

Of a row, XLA's `top_k` is quick for small `k`. Of millions of numbers it would sort; a
threshold that `k` of them reach is found in a few counting passes instead, each a sum,
which an array spread over devices needs little communication for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


def keep_largest(x: Array, k: int) -> Array:
    """Returns non-negative numbers with all but each row's k largest set to zero.

    Equal ones at the edge are all kept. A gradient flows through those that are.
    """
    if k >= x.shape[-1]:
        return x
    edge = jax.lax.top_k(jax.lax.stop_gradient(x), k)[0][..., -1:]
    return jnp.where(x >= edge, x, 0)


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


class _Bracket(NamedTuple):
    """Thresholds that at least `k` numbers reach, and fewer do."""

    low: Array
    at_low: Array
    high: Array
    at_high: Array
    step: Array


def edge_of_largest(x: Array, k: int) -> Array:
    """Returns a number that exactly `k` of a matrix reach, or as few as ties allow.

    Interpolates the logarithm of the count, which falls about linearly with the
    threshold, and bisects in every third step, so that it always ends.

    Args:
      x: float32 or float64; none negative or NaN.
      k: from 1 up. The edge is 0 if fewer are positive.
    """
    tiny = jnp.asarray(jnp.finfo(x.dtype).tiny, x.dtype)
    highest = jnp.nextafter(x.max(), jnp.asarray(jnp.inf, x.dtype))

    def count(edge: Array) -> Array:
        # Along the first axis first: the compiler keeps vectors that way.
        return (x >= edge).sum(0, dtype=jnp.int32).sum(dtype=jnp.int32)

    def apart(now: _Bracket) -> Array:
        return (now.at_low > k) & (jnp.nextafter(now.low, now.high) < now.high)

    def narrower(now: _Bracket) -> _Bracket:
        many, few, wanted = (
            jnp.log(jnp.asarray(y, x.dtype) + 0.5) for y in (now.at_low, now.at_high, k)
        )
        share = jnp.where(now.step % 3 == 2, 0.5, (many - wanted) / (many - few))
        tried = now.low + share.astype(x.dtype) * (now.high - now.low)
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

    zero = jnp.zeros((), jnp.int32)
    begun = _Bracket(tiny, count(tiny), highest, zero, zero)
    found = jax.lax.while_loop(apart, narrower, begun)
    return jnp.where(begun.at_low < k, jnp.zeros((), x.dtype), found.low)


def _halfway(low: Array, high: Array) -> Array:
    """Returns the number in the middle between two, as bits count them."""
    kind = jnp.int64 if low.dtype == jnp.float64 else jnp.int32
    a, b = (jax.lax.bitcast_convert_type(y, kind) for y in (low, high))
    return jax.lax.bitcast_convert_type(a + (b - a) // 2, low.dtype)
