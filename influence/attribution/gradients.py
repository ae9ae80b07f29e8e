"""Gradients of what is asked, all queries' together, a matrix for each layer.

Of any function of parameters by `jax.grad`; of log-probabilities also as a training
sequence's are read, in the eigenbasis, where the inverse curvature only scales them.
The first half of solving for them then costs `T (O² + I²)` multiplications a matrix in
place of `O I (O + I)`.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import starmap
from math import prod
from typing import Any, TypeGuard

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
from influence.curvature.coordinates import READING, grouped
from influence.curvature.operator import Curvature
from influence.linalg.contract import wide
from influence.model.reading import by_layer, read
from influence.model.tangents import covered, matrices
from influence.model.trace import trace
from influence.types import Layer, Params, with_leaves

BESIDE = 0.25
"""How large all layers' bases may be beside the gradients that are read with them.

They have to be there together, where solving takes them layer by layer.
"""


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
    return _stacked(each, len(measurements))


def readable(
    measurements: Mapping[str, Measurement], layers: Sequence[Layer]
) -> TypeGuard[Mapping[str, Likelihood]]:
    """Returns whether gradients are better read in the eigenbasis.

    If all are of log-probabilities, and of so many that the bases are little beside
    them. An embedding is looked up, and its gradient is found faster that way.
    """
    inputs = {x.reads: _basis(x, x.columns, diagonal=x.diagonal[0]) for x in layers}
    outputs = [_basis(x, x.outputs, diagonal=x.diagonal[1]) for x in layers]
    each = sum(prod(x.stack) * x.outputs * x.columns for x in layers)
    return (
        bool(measurements)
        and all(map(is_likelihood, measurements.values()))
        and all(x.kind != "embedding" for x in layers)
        and sum(inputs.values()) + sum(outputs) <= BESIDE * len(measurements) * each
    )


def _basis(layer: Layer, size: int, *, diagonal: bool) -> int:
    """Returns how many numbers the bases of a side of a layer hold, at most."""
    return 0 if diagonal else prod(layer.stack) * size**2


def coordinates(
    curvature: Curvature, params: Params, measurements: Mapping[str, Likelihood]
) -> tuple[dict[str, Array], tuple[float, ...]]:
    """Returns gradients in the eigenbasis, `[Q, *stack, O, I]` by layer, and values.

    Raises:
      ValueError: as `gradients` does.
    """
    layers = curvature.layers
    blocks = {x.name: curvature.blocks[x.name] for x in layers}
    inputs = {x.reads: blocks[x.name].inputs for x in layers}
    outputs = {name: x.outputs for name, x in blocks.items()}
    given = grouped(layers, inputs, outputs)
    del blocks

    def one(name: str, measurement: Likelihood) -> tuple[float, dict[str, Array]]:
        measurement.check(name, params)
        value, total, own = _read(layers, measurement, params, given)
        return _sound(name, value, total), own

    return _stacked(starmap(one, measurements.items()), len(measurements))


def _stacked(
    each: Iterable[tuple[float, dict[str, Array]]], queries: int
) -> tuple[dict[str, Array], tuple[float, ...]]:
    """Returns the gradients of so many measurements together, and their values."""
    values, stacked = [], {}
    for place, (value, own) in enumerate(each):
        values.append(value)
        # Into its place at once: they may well be most of the memory, which all of
        # them and a stack of them would take twice.
        stacked = stacked or _empty(queries, own)
        stacked = _placed(stacked, own, place)
    return stacked, tuple(values)


@jax.jit(static_argnums=0)
def _read(
    layers: tuple[Layer, ...],
    measurement: Likelihood,
    params: Params,
    given: Mapping[str, Any],
) -> tuple[Array, Array, dict[str, Array]]:
    """Returns a value, the sum of its gradient's absolute values, and the gradient.

    In the eigenbasis.
    """
    program = trace(measurement.task.outputs, params, measurement.inputs)
    value, found = read(
        program, layers, READING, measurement.of, params, measurement.inputs, given
    )
    own = {k: x.squeeze(-3) for k, x in by_layer(found).items()}
    return value, _size(own), own


@jax.jit(static_argnums=0)
def _empty(queries: int, one: Mapping[str, Array]) -> dict[str, Array]:
    return {k: jnp.zeros((queries, *x.shape), x.dtype) for k, x in one.items()}


@jax.jit(donate_argnums=0)
def _placed(
    stacked: Mapping[str, Array], one: Mapping[str, Array], place: Array
) -> dict[str, Array]:
    return {k: x.at[place].set(one[k]) for k, x in stacked.items()}


def _measured(
    name: str, measurement: Measurement, layers: tuple[Layer, ...], params: Params
) -> tuple[float, dict[str, Array]]:
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
    return _sound(name, value, total), gradients


def _sound(name: str, value: Array, total: Array) -> float:
    """Returns a measurement's value.

    Raises:
      ValueError: if it or the sum of its gradient's absolute values is not finite, or
        that is zero.
    """
    size = float(total)
    if not np.isfinite([float(value), size]).all():
        raise ValueError(
            f"The measurement {name!r} is {float(value)} and its gradient sums to "
            f"{size} in absolute value: not a finite number."
        )
    if size == 0:
        raise ValueError(
            f"The measurement {name!r} does not depend on any of the curvature's "
            "layers: its gradient is zero, and so would be every score."
        )
    return float(value)


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
    return value, _size(found), found


def _size(found: Mapping[str, Array]) -> Array:
    """Returns the sum of absolute values."""
    # Layers of several types have no sum in one until they are brought to it.
    into = wide(*(x.dtype for x in found.values()))
    sizes: list[Any] = [jnp.abs(x).sum(dtype=into) for x in found.values()]
    return jnp.stack(sizes).sum()
