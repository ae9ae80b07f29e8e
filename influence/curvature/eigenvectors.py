"""The eigenvectors of a layer's covariances: the basis its curvature is kept in.

A pass over the sides of layers rather than over data. For wide layers it takes longer
than many batches do, and whoever carries out passes may stop between two sides, or deal
sides out to several devices.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from influence.curvature.covariance import Covariances, Factors, Moments
from influence.curvature.eigenvalues import Bases
from influence.fold import Fold, Items, each
from influence.linalg.basis import Basis, eigen
from influence.types import Layer


class Side(NamedTuple):
    """What goes into a layer, or what flows back out of it.

    Attributes:
      layer: the layer; of those that read one activation, the first.
      inputs: whether it is the input side.
    """

    layer: Layer
    inputs: bool


def sides(layers: Sequence[Layer]) -> list[Side]:
    """Returns every side that has a covariance of its own, layer by layer."""
    first = {x.reads: x for x in reversed(layers)}
    found = []
    for x in layers:
        found += [Side(x, True)] if first[x.reads] is x else []
        found.append(Side(x, False))
    return found


def fold(layers: Sequence[Layer], factors: Factors, moments: Covariances) -> Fold:
    """Returns the pass over `sides` that finds their `Bases`."""
    return each(
        "eigenvectors",
        partial(_init, sides(layers), factors, moments),
        Items(
            take=partial(_taken, factors, moments),
            work=_eigenvectors,
            put=_put,
            cost=partial(_cost, factors),
        ),
    )


def _init(all_sides: Sequence[Side], factors: Factors, moments: Covariances) -> Bases:
    """Returns zeros in the place of eigenvectors."""
    inputs, outputs = {}, {}
    for side in all_sides:
        found = _moments(side, moments)
        whole = [jnp.zeros_like(x) for x in found] if _cut(side, factors) else []
        into = inputs if side.inputs else outputs
        into[_name(side)] = Basis(tuple(whole))
    return Bases(inputs, outputs)


def _taken(factors: Factors, moments: Covariances, side: Side) -> Moments:
    """Returns the blocks whose eigenvectors are found; none of a standard basis."""
    return _moments(side, moments) if _cut(side, factors) else ()


def _eigenvectors(found: Moments) -> Moments:
    return tuple(eigen(x)[1] if x.ndim == 2 else one_by_one(x) for x in found)


@jax.jit
def one_by_one(stack_SxNxN: Array) -> Array:
    """Returns the eigenvectors of stacked matrices, `[*stack, N, N]`, in columns.

    Of one matrix after another: in float64 and with their workspace all of them would
    be several times as large as they are.
    """
    flat = stack_SxNxN.reshape(-1, *stack_SxNxN.shape[-2:])
    return jax.lax.map(lambda x: eigen(x)[1], flat).reshape(stack_SxNxN.shape)


def _put(bases: Bases, side: Side, found: Moments) -> Bases:
    own = {_name(side): Basis(found)}
    if side.inputs:
        return bases._replace(inputs=bases.inputs | own)
    return bases._replace(outputs=bases.outputs | own)


def _cost(factors: Factors, side: Side) -> float:
    """Returns about how many multiplications a side takes, up to a factor."""
    return math.prod(side.layer.stack) * sum(n**3 for n in _cut(side, factors))


def _name(side: Side) -> str:
    return side.layer.reads if side.inputs else side.layer.name


def _cut(side: Side, factors: Factors) -> tuple[int, ...]:
    """Returns the lengths of a side's blocks; none if it keeps the standard basis."""
    return (factors.inputs if side.inputs else factors.outputs)(side.layer)


def _moments(side: Side, moments: Covariances) -> Moments:
    found = moments.inputs if side.inputs else moments.gradients
    return found[_name(side)]
