"""One matrix product, and how to read it as `y = W a`.

A model may write a layer's product in many ways: the weight on either side, several
contracted axes (an output projection over heads), several free ones (a projection into
heads), axes the product is batched over (one matrix per expert or per head), examples
and positions merged or in any order. `Product` knows one of them and hands out its
operands in the one layout everything else here is written in: `a_BxTxI`, `g_BxTxO` and
`W_OxI`, behind the axes the product is batched over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, cast

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn, Var

from influence.model import jaxprs
from influence.model.jaxprs import aval
from influence.types import Layer, Step

Axes = tuple[int | None, ...]
"""For each axis of a value, the axis it came from; None where it was inserted."""


class Weight(NamedTuple):
    """A value that is one parameter, cast and rearranged.

    Attributes:
      name: the parameter's path.
      stack: the lengths of the scans that have sliced it.
      shape: the shape of that slice.
      view: the steps from the slice to this value; None once it was broadcast.
      axes: where each axis came from, as long as axes were only moved or inserted.
    """

    name: str
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    view: tuple[Step, ...] | None
    axes: Axes | None


def whole(name: str, shape: tuple[int, ...], stack: tuple[int, ...] = ()) -> Weight:
    """Returns a parameter, or a scan's slice of one, as it is."""
    axes = tuple(None if size == 1 else i for i, size in enumerate(shape))
    return Weight(name, stack, shape, (), axes)


@dataclass(frozen=True, eq=False)
class Product:
    """The product of an activation and a weight.

    Attributes:
      eqn: the `dot_general`.
      side: which of its operands is the weight, 0 or 1.
      weight: the parameter behind that operand.
      example: the axis of the activation that holds the examples; it may hold several
        positions of each, example by example.
      examples: `B`.
    """

    eqn: JaxprEqn
    side: int
    weight: Weight
    example: int
    examples: int

    @property
    def out(self) -> Var:
        """Returns the variable that holds the product."""
        return self.eqn.outvars[0]

    @property
    def activation(self) -> Var:
        """Returns the variable that holds the activation."""
        return cast(Var, self.eqn.invars[1 - self.side])

    @property
    def operand(self) -> Var:
        """Returns the variable that holds the rearranged weight."""
        return cast(Var, self.eqn.invars[self.side])

    @property
    def stack(self) -> tuple[int, ...]:
        """Returns the lengths of the axes the product is batched over."""
        batch, _, _ = operand_axes(self.eqn, self.side)
        return tuple(aval(self.operand).shape[i] for i in batch)

    @property
    def positions(self) -> int:
        """Returns `T`, how many positions of an example pass through the product."""
        _, free, _ = operand_axes(self.eqn, 1 - self.side)
        shape = aval(self.activation).shape
        return prod(shape[i] for i in free) // self.examples

    @property
    def inputs(self) -> int:
        """Returns `I`."""
        _, _, contracted = operand_axes(self.eqn, self.side)
        return prod(aval(self.operand).shape[i] for i in contracted)

    @property
    def outputs(self) -> int:
        """Returns `O`."""
        _, free, _ = operand_axes(self.eqn, self.side)
        return prod(aval(self.operand).shape[i] for i in free)

    def multiply(self, a: Array, w: Array) -> Array:
        """Carries out the product as the model wrote it."""
        (out,) = jaxprs.bind(self.eqn, (a, w) if self.side else (w, a))
        return out

    def input(self, a: Array) -> Array:
        """Returns the activation as `[*stack, B, T, I]`."""
        batch, free, contracted = operand_axes(self.eqn, 1 - self.side)
        rest = [i for i in free if i != self.example]
        a = lax.transpose(a, (*batch, self.example, *rest, *contracted))
        return a.reshape(*self.stack, self.examples, self.positions, self.inputs)

    def gradient(self, g: Array) -> Array:
        """Returns the cotangent of the result as `[*stack, B, T, O]`."""
        batch, free, _ = operand_axes(self.eqn, 1 - self.side)
        outputs = result_axes(self.eqn, self.side)
        positions = result_axes(self.eqn, 1 - self.side)
        example = positions.pop(free.index(self.example))
        g = lax.transpose(g, (*range(len(batch)), example, *positions, *outputs))
        return g.reshape(*self.stack, self.examples, self.positions, self.outputs)

    def weight_view(self) -> tuple[Step, ...]:
        """Returns the steps from the parameter to matrices `[*stack, O, I]`."""
        batch, free, contracted = operand_axes(self.eqn, self.side)
        return below(
            self.weight.stack,
            *(self.weight.view or ()),
            ("transpose", (*batch, *free, *contracted)),
            ("reshape", (*self.stack, self.outputs, self.inputs)),
        )

    def bias_view(self, bias: Weight, axes: Axes) -> tuple[Step, ...] | None:
        """Returns the steps from a bias to vectors `[*stack, O]`, if it is one.

        A bias has one entry per output, the same at every position.

        Args:
          bias: what is added to the result.
          axes: for each axis of the sum, the axis of the result it came from.
        """
        if bias.axes is None or bias.stack != self.weight.stack:
            return None
        batch, _, _ = operand_axes(self.eqn, self.side)
        own = [*range(len(batch)), *result_axes(self.eqn, self.side)]
        source = dict(zip(axes, bias.axes, strict=True))
        length = aval(self.out).shape
        missing = any(source.get(i) is None and length[i] != 1 for i in own)
        elsewhere = any(i is not None for axis, i in source.items() if axis not in own)
        if missing or elsewhere:
            return None
        order = [i for axis in own if (i := source.get(axis)) is not None]
        units = [i for i in range(len(bias.shape)) if i not in order]
        return below(
            self.weight.stack,
            ("transpose", (*order, *units)),
            ("reshape", (*self.stack, self.outputs)),
        )


def operand_axes(eqn: JaxprEqn, side: int) -> tuple[list[int], list[int], list[int]]:
    """Returns the batch, free and contracted axes of one operand of a `dot_general`."""
    contracted, batch = eqn.params["dimension_numbers"]
    used = {*contracted[side], *batch[side]}
    free = [i for i in range(aval(eqn.invars[side]).ndim) if i not in used]
    return list(batch[side]), free, list(contracted[side])


def result_axes(eqn: JaxprEqn, side: int) -> list[int]:
    """Returns the axes of the result that one operand's free axes become."""
    batch, left, _ = operand_axes(eqn, 0)
    start = len(batch) + side * len(left)
    _, free, _ = operand_axes(eqn, side)
    return list(range(start, start + len(free)))


def below(stack: tuple[int, ...], *steps: Step) -> tuple[Step, ...]:
    """Returns the same steps for an array with the axes of `stack` in front."""
    lead = range(len(stack))
    shifted = {
        "reshape": lambda shape: (*stack, *shape),
        "transpose": lambda order: (*lead, *(i + len(stack) for i in order)),
    }
    return tuple((kind, shifted[kind](argument)) for kind, argument in steps)


def matrix(layer: Layer, leaves: Mapping[str, Array]) -> Array:
    """Returns a layer's `[W b]` as `[*stack, O, I]`, from parameters by their paths.

    Or the gradient with respect to it, from gradients with respect to parameters: a
    view only moves entries.
    """
    weight = _view(layer.weight_view, leaves[layer.name])
    if layer.bias is None:
        return weight
    bias = _view(layer.bias_view, leaves[layer.bias])
    return jnp.concatenate([weight, bias[..., None].astype(weight.dtype)], axis=-1)


def _view(steps: tuple[Step, ...], array: Array) -> Array:
    move = {"reshape": jnp.reshape, "transpose": jnp.transpose}
    for kind, argument in steps:
        array = move[kind](array, argument)
    return array
