"""Between parameters and the matrices of layers, and derivatives along them.

A layer's view only moves entries, so what maps a gradient's leaves to matrices maps,
transposed, matrices back to leaves.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from influence.model import jaxprs
from influence.model.weight import matrix
from influence.types import Layer, Params, named_leaves

Leaves = dict[str, Array]
"""Parameters, or tangents or gradients of them, by path."""


def covered(params: Params, layers: Sequence[Layer]) -> Leaves:
    """Returns the parameters some layers are made of, by path."""
    leaves = named_leaves(params)
    names = {x.parameter for x in layers} | {x.bias for x in layers if x.bias}
    return {name: jnp.asarray(leaves[name]) for name in sorted(names)}


def matrices(layers: Sequence[Layer], leaves: Leaves) -> dict[str, Array]:
    """Returns each layer's `[*stack, O, I]`."""
    return {x.name: matrix(x, leaves) for x in layers}


def tangent(layers: Sequence[Layer], leaves: Leaves, v: Mapping[str, Any]) -> Leaves:
    """Returns matrices `v` as a tangent of the parameters, in their types.

    Args:
      layers: the layers.
      leaves: the parameters, of which only shapes and types are used.
      v: by layer, `[*stack, O, I]`.
    """
    shapes = jax.eval_shape(lambda x: matrices(layers, x), leaves)
    back = jax.linear_transpose(lambda x: matrices(layers, x), leaves)
    (found,) = back({k: v[k].astype(x.dtype) for k, x in shapes.items()})
    return found


def derivatives(
    run: Callable[[Leaves], Any], leaves: Leaves
) -> tuple[Any, Callable[[Leaves], Any], Callable[[Any], tuple[Leaves]]]:
    """Returns a function's value, and its derivative forwards and backwards.

    A model with a backward rule of its own (`jax.custom_vjp`) has no forward-mode
    derivative; its backward one, which is linear, is transposed instead.
    """
    value, forward = jax.linearize(run, leaves)
    program = jax.make_jaxpr(forward)(leaves).jaxpr
    if any(x.primitive.name == "custom_lin" for x in jaxprs.equations(program)):
        value, backward = jax.vjp(run, leaves)
        transposed = jax.linear_transpose(backward, value)
        return value, lambda tangent: transposed((tangent,))[0], backward
    return value, forward, jax.linear_transpose(forward, leaves)
