"""Minima of several functions at once, from their values and slopes.

Vectors are those of `solvers`: pytrees of arrays with a leading axis, one vector for
each function. Every function goes at a pace of its own, yet one evaluation serves all
of them; whoever walks decides when to stop.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from influence.linalg.solvers import Operator, Vector, add, dot

Evaluate = Callable[[Vector], tuple[Array, Vector]]
"""`x -> (values_M, slopes)`: each function at its own point."""

ENOUGH, STEEP, ROUNDING = 1e-4, 0.8, 1e-6
"""A function has to fall by this share of what its slope promises (Armijo). Or, for a
fall is lost in rounding where it is small: the slope must not have become this steep
the other way, and the function may have risen by that share (Hager & Zhang 2005)."""


class Point(NamedTuple):
    """Where each function is.

    Attributes:
      x: the points so far.
      value_M: the functions there.
      slope: and their derivatives.
    """

    x: Vector
    value_M: Array
    slope: Vector


class _Pairs(NamedTuple):
    """The last moves and what slopes changed by, `[K, M, …]`, the newest last."""

    moves: Vector
    changes: Vector


def lbfgs(
    evaluate: Evaluate, precondition: Operator, x: Vector, memory: int = 20
) -> Iterator[Point]:
    """Yields a point after every evaluation, for ever.

    Limited-memory BFGS (Nocedal 1980) that begins with a given inverse. A function that
    does not fall enough stays where it is, and next looks half as far.

    Args:
      evaluate: the functions.
      precondition: `≈ H⁻¹`, on all vectors at once.
      x: where to begin.
      memory: how many moves the inverse is improved by.
    """
    point = Point(x, *evaluate(x))
    none = jax.tree.map(lambda y: jnp.zeros((memory, *y.shape), y.dtype), x)
    pairs = _Pairs(none, none)
    rate_M = jnp.ones_like(point.value_M)
    while True:
        yield point
        move = _direction(precondition, pairs, point.slope)
        promised_M = dot(point.slope, move)
        there = add(point.x, rate_M, move)
        trial = Point(there, *evaluate(there))
        slope_M = dot(trial.slope, move)
        pairs, point, rate_M = _step(pairs, point, trial, rate_M, promised_M, slope_M)


@jax.jit
def _step(
    pairs: _Pairs,
    before: Point,
    after: Point,
    rate_M: Array,
    promised_M: Array,
    slope_M: Array,
) -> tuple[_Pairs, Point, Array]:
    """Returns what there is to remember, where functions are, and how far to look."""
    fell_M = _fell(before, after, rate_M, promised_M, slope_M)
    point = jax.tree.map(partial(_where, fell_M), after, before)
    return _remembered(pairs, before, after), point, jnp.where(fell_M, 1, rate_M / 2)


def _fell(
    before: Point, after: Point, rate_M: Array, promised_M: Array, slope_M: Array
) -> Array:
    enough_M = after.value_M <= before.value_M + ENOUGH * rate_M * promised_M
    level_M = after.value_M <= before.value_M + ROUNDING * jnp.abs(before.value_M)
    return enough_M | (level_M & (slope_M <= -STEEP * promised_M))


def _remembered(pairs: _Pairs, before: Point, after: Point) -> _Pairs:
    """Returns pairs with one more where a function curves upwards along the move."""
    less_M = -jnp.ones_like(before.value_M)
    move = add(after.x, less_M, before.x)
    change = add(after.slope, less_M, before.slope)
    kept_M = dot(move, change) > 0

    def pushed(old: Array, new: Array) -> Array:
        return _where(kept_M, jnp.concatenate([old[1:], new[None]]), old, axis=1)

    return _Pairs(
        jax.tree.map(pushed, pairs.moves, move),
        jax.tree.map(pushed, pairs.changes, change),
    )


def _direction(precondition: Operator, pairs: _Pairs, slope: Vector) -> Vector:
    """Returns minus the improved inverse times the slope (the two-loop recursion)."""
    left, shares = _into(pairs, slope)
    return _out_of(pairs, precondition(left), shares)


@jax.jit
def _into(pairs: _Pairs, slope: Vector) -> tuple[Vector, Array]:
    def back(left: Vector, pair: _Pairs) -> tuple[Vector, Array]:
        share_M = _over(dot(pair.moves, left), dot(pair.moves, pair.changes))
        return add(left, -share_M, pair.changes), share_M

    return jax.lax.scan(back, slope, pairs, reverse=True)


@jax.jit
def _out_of(pairs: _Pairs, v: Vector, shares_KxM: Array) -> Vector:
    def forth(v: Vector, each: tuple[_Pairs, Array]) -> tuple[Vector, None]:
        pair, share_M = each
        other_M = _over(dot(pair.changes, v), dot(pair.moves, pair.changes))
        return add(v, share_M - other_M, pair.moves), None

    found, _ = jax.lax.scan(forth, v, (pairs, shares_KxM))
    return jax.tree.map(jnp.negative, found)


def _over(x_M: Array, y_M: Array) -> Array:
    """Returns `x / y`, and 0 of a place in memory that is still empty."""
    return jnp.where(y_M > 0, x_M / jnp.where(y_M > 0, y_M, 1), 0)


def _where(which_M: Array, x: Array, y: Array, axis: int = 0) -> Array:
    shape = [1] * x.ndim
    shape[axis] = len(which_M)
    return jnp.where(which_M.reshape(shape), x, y)
