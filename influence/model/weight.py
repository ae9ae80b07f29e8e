"""A parameter on its way to where it is used, and the views that follow it there.

A *view* is a list of steps that take a parameter to a layer's matrices. Steps only move
entries or leave some out, so the same steps take the gradient with respect to the
parameter to the gradient with respect to the matrices.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import JaxprEqn

from influence.types import Layer, Step

Axes = tuple[int | None, ...]
"""For each axis of a value, the axis it came from; None where it was inserted."""

Cut = tuple[tuple[int, int, int], ...]
"""`(axis, start, stop)` for every axis that was cut, in order."""


class Weight(NamedTuple):
    """A value that is one parameter, or a part of it, cast, scaled and rearranged.

    Attributes:
      name: the parameter's path.
      shape: what the scans and the cut have left of the parameter's shape.
      view: the steps from there to this value; None once it was broadcast.
      axes: where each axis came from, as long as axes were only moved or inserted.
      scans: the scans around, and whether each walks over the parameter (True) or uses
        it anew in every step (False).
      cut: which part of the parameter this is.
      factor: what the parameter was multiplied by on its way.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[Step, ...] | None
    axes: Axes | None
    scans: tuple[tuple[JaxprEqn, bool], ...] = ()
    cut: Cut = ()
    factor: float = 1.0

    @property
    def stack(self) -> tuple[int, ...]:
        """Returns the lengths of the scans that walk over the parameter."""
        return tuple(eqn.params["length"] for eqn, walks in self.scans if walks)

    @property
    def repeated(self) -> bool:
        """Returns whether a scan uses this value anew in every step."""
        return not all(walks for _, walks in self.scans)

    @property
    def label(self) -> str:
        """Returns the parameter's path with the part: `qkv[:, 0:64]`, `mlp.up[1]`."""
        if not self.cut:
            return self.name
        bounds = {axis: (start, stop) for axis, start, stop in self.cut}
        said = [
            _span(*bounds[i]) if i in bounds else ":" for i in range(max(bounds) + 1)
        ]
        return f"{self.name}[{', '.join(said)}]"

    def below(self, *steps: Step) -> tuple[Step, ...]:
        """Returns steps from here as steps from the parameter."""
        cut: list[Step] = [("slice", bounds) for bounds in self.cut]
        return _below(self.stack, *cut, *steps)


def whole(
    name: str,
    shape: tuple[int, ...],
    scans: tuple[tuple[JaxprEqn, bool], ...] = (),
) -> Weight:
    """Returns a parameter, or a scan's slice of one, as it is."""
    return Weight(name, shape, (), _axes(shape), scans)


def part(weight: Weight, cut: Sequence[tuple[int, int, int]]) -> Weight | None:
    """Returns a part of a parameter; None if it was rearranged before."""
    if weight.view != ():
        return None
    bounds = {axis: (start, stop) for axis, start, stop in weight.cut}
    shape = list(weight.shape)
    for axis, start, stop in cut:
        if stop - start < shape[axis]:
            offset, _ = bounds.get(axis, (0, 0))
            bounds[axis] = (offset + start, offset + stop)
            shape[axis] = stop - start
    kept = tuple((axis, *bounds[axis]) for axis in sorted(bounds))
    return weight._replace(shape=tuple(shape), axes=_axes(shape), cut=kept)


def overlap(cuts: Iterable[Cut]) -> bool:
    """Returns whether two different parts of a parameter have entries in common."""
    cuts = list(dict.fromkeys(cuts))
    return any(_meet(x, y) for i, x in enumerate(cuts) for y in cuts[:i])


def _meet(first: Cut, second: Cut) -> bool:
    bounds = {axis: (start, stop) for axis, start, stop in second}
    both = ((x, y, *bounds[axis]) for axis, x, y in first if axis in bounds)
    return all(x < stop and start < y for x, y, start, stop in both)


def _axes(shape: Sequence[int]) -> Axes:
    return tuple(None if size == 1 else i for i, size in enumerate(shape))


def _span(start: int, stop: int) -> str:
    return str(start) if stop - start == 1 else f"{start}:{stop}"


def _below(stack: tuple[int, ...], *steps: Step) -> tuple[Step, ...]:
    """Returns the same steps for an array with the axes of `stack` in front."""
    lead, n = range(len(stack)), len(stack)
    shifted = {
        "reshape": lambda shape: (*stack, *shape),
        "transpose": lambda order: (*lead, *(i + n for i in order)),
        "slice": lambda bounds: (bounds[0] + n, *bounds[1:]),
    }
    return tuple((kind, shifted[kind](argument)) for kind, argument in steps)


def matrix(layer: Layer, leaves: Mapping[str, Array]) -> Array:
    """Returns a layer's `[W b]` as `[*stack, O, I]`, from parameters by their paths.

    Or the gradient with respect to it, from gradients with respect to parameters: a
    view only moves entries.
    """
    weight = _viewed(layer.weight_view, leaves[layer.parameter])
    if layer.bias is None:
        return weight
    bias = _viewed(layer.bias_view, leaves[layer.bias])
    return jnp.concatenate([weight, bias[..., None].astype(weight.dtype)], axis=-1)


def _viewed(steps: tuple[Step, ...], array: Array) -> Array:
    move = {
        "reshape": jnp.reshape,
        "transpose": jnp.transpose,
        "slice": lambda x, cut: lax.slice_in_dim(x, cut[1], cut[2], axis=cut[0]),
    }
    for kind, argument in steps:
        array = move[kind](array, argument)
    return array


def arrangement(shape: tuple[int, ...], steps: Sequence[Step]) -> tuple:
    """Returns what two views of one array share just when they are the same view.

    That is the resulting shape and where entries go. Of a large array only some entries
    are followed: views that differ at all disagree on half of them or more.
    """
    size = prod(shape)
    if size <= 4096:
        places = np.arange(size)
    else:
        places = np.random.default_rng(0).integers(size, size=4096)
    for kind, argument in steps:
        if kind == "transpose":
            index = np.unravel_index(places, shape)
            shape = tuple(shape[i] for i in argument)
            places = np.ravel_multi_index([index[i] for i in argument], shape)
        else:
            shape = argument
    return shape, places.tolist()
