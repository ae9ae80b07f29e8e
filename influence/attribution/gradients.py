"""Gradients of what is asked by `jax.grad`: any functions of parameters.

All queries' together, a matrix for each layer.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.attribution.measurements import (
    Likelihood,
    Measurement,
    as_tree,
    result_of,
)
from influence.linalg.contract import wide
from influence.model.tangents import covered, matrices
from influence.types import Layer, Params, with_leaves


def gradients(
    layers: tuple[Layer, ...], params: Params, measurements: Mapping[str, Measurement]
) -> tuple[dict[str, Array], tuple[float, ...]]:
    """Returns measurements' gradients `[Q, *stack, O, I]` by layer, and their values.

    Raises:
      ValueError: if there are none, or one is not a finite scalar or does not depend on
        the layers.
    """
    if not measurements:
        raise ValueError("There are no measurements: name at least one.")
    each = (_measured(name, x, layers, params) for name, x in measurements.items())
    values, found = stacked(each, len(measurements))
    return found, tuple(np.asarray(values, float).tolist())


def stacked(each: Iterable[Any], queries: int, axes: Any = 0) -> Any:
    """Returns arrays of so many queries together.

    Args:
      each: the queries' arrays, one tree after another.
      queries: how many there are, one at least.
      axes: where axis `Q` goes, a number or a tree of them, as `vmap` has `out_axes`.
    """
    each = iter(each)
    one = next(each)
    axes = tuple(jax.tree.leaves(jax.tree.broadcast(axes, one)))
    found = placed(axes, _empty(axes, queries, one), one, 0)
    del one
    for place in range(1, queries):
        # Into its place at once, and by no name: they may well be most of the memory,
        # which all of them and a stack of them would take twice.
        found = placed(axes, found, next(each), place)
    return found


@jax.jit(static_argnums=(0, 1))
def _empty(axes: tuple[int, ...], queries: int, one: Any) -> Any:
    def empty(q: int, x: Array) -> Array:
        return jnp.zeros((*x.shape[:q], queries, *x.shape[q:]), x.dtype)

    return _each(axes, empty, one)


@jax.jit(static_argnums=0, donate_argnums=1)
def placed(axes: tuple[int, ...], found: Any, one: Any, place: int) -> Any:
    """Returns all queries' arrays with those of one in their place."""

    def put(q: int, x: Array, own: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(x, own, place, q)

    return _each(axes, put, found, one)


def _each(axes: tuple[int, ...], work: Callable[..., Array], *trees: Any) -> Any:
    """Returns a tree of what is made of every leaf and its axis."""
    where = jax.tree.unflatten(jax.tree.structure(trees[0]), axes)
    return jax.tree.map(work, where, *trees)


def _measured(
    name: str, measurement: Measurement, layers: tuple[Layer, ...], params: Params
) -> tuple[Array, dict[str, Array]]:
    """Returns a measurement's value and its gradient, a matrix per layer."""
    measurement = as_tree(measurement)
    for part in jax.tree.leaves(measurement, is_leaf=is_likelihood):
        if is_likelihood(part):
            part.check(name, params)
    shape = result_of(measurement, params)
    if shape.shape != ():
        raise ValueError(
            f"The measurement {name!r} returns an array of shape {shape.shape}. Return "
            "one number; name several measurements to have several."
        )
    value, total, gradients = _differentiate(measurement, layers, params)
    check_sound(name, value, total)
    return value, gradients


def check_sound(name: str, value: Array, total: Array) -> None:
    """Raises if a measurement can't be asked for.

    Raises:
      ValueError: if its value or the sum of its gradient's absolute values is not
        finite, or that is zero.
    """
    sum_ = float(total)
    if not np.isfinite([float(value), sum_]).all():
        raise ValueError(
            f"The measurement {name!r} is {float(value)} and its gradient sums to "
            f"{sum_} in absolute value: not a finite number."
        )
    if sum_ == 0:
        raise ValueError(
            f"The measurement {name!r} does not depend on any of the curvature's "
            "layers: its gradient is zero, and so would be every score."
        )


def is_likelihood(x: Any) -> bool:
    """Returns whether something is a log-probability."""
    return isinstance(x, Likelihood)


@jax.jit(static_argnums=1)
def _differentiate(
    measurement: Measurement, layers: tuple[Layer, ...], params: Params
) -> tuple[Array, Array, dict[str, Array]]:
    """Returns a value, the sum of its gradient's absolute values, and the gradient."""
    value, gradient = jax.value_and_grad(
        lambda leaves: measurement(with_leaves(params, leaves))
    )(covered(params, layers))
    found = matrices(layers, gradient)
    return value, size(found), found


def size(found: Mapping[str, Array]) -> Array:
    """Returns the sum of a gradient's absolute values."""
    # Layers of several types have no sum in one until they are brought to it.
    into = wide(*(x.dtype for x in found.values()))
    sizes: list[Any] = [jnp.abs(x).sum(dtype=into) for x in found.values()]
    return jnp.stack(sizes).sum()
