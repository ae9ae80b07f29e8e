"""The eigenvectors of a layer's covariances: the basis its curvature is kept in.

A pass over the sides of layers rather than over data. For wide layers it takes longer
than many batches do, and whoever carries out passes may stop between two sides.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp

from influence.curvature.covariance import Covariances, Factors, Moments
from influence.curvature.eigenvalues import Bases
from influence.fold import Fold
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
    return Fold(
        "eigenvectors",
        init=partial(_init, sides(layers), factors, moments),
        update=partial(_update, factors, moments),
        finish=lambda bases: bases,
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


def _update(factors: Factors, moments: Covariances, bases: Bases, side: Side) -> Bases:
    found = _moments(side, moments) if _cut(side, factors) else ()
    own = {_name(side): Basis(tuple(eigen(x)[1] for x in found))}
    if side.inputs:
        return bases._replace(inputs=bases.inputs | own)
    return bases._replace(outputs=bases.outputs | own)


def _name(side: Side) -> str:
    return side.layer.reads if side.inputs else side.layer.name


def _cut(side: Side, factors: Factors) -> tuple[int, ...]:
    """Returns the lengths of a side's blocks; none if it keeps the standard basis."""
    return (factors.inputs if side.inputs else factors.outputs)(side.layer)


def _moments(side: Side, moments: Covariances) -> Moments:
    found = moments.inputs if side.inputs else moments.gradients
    return found[_name(side)]
