"""One matrix product, and how to read it as `y = W a`.

A model may write a layer's product in many ways: the weight on either side, several
contracted axes (an output projection over heads), several free ones (a projection into
heads), axes the product is batched over (one matrix per expert or per head), examples
and positions merged or in any order. `Product` knows one of them and hands out its
operands in the one layout everything else here is written in: `a_BxTxI`, `g_BxTxO` and
`W_OxI`, behind the axes the product is batched over.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from jax import Array, lax
from jax.extend.core import JaxprEqn

from influence.model.jaxprs import aval
from influence.model.use import MIXED, Use, example_axis, grown
from influence.model.weight import Weight
from influence.types import Step


@dataclass(frozen=True, eq=False)
class Product(Use):
    """The product of an activation and a weight: `left = g`, `right = a`."""

    kind: ClassVar[str] = "matrix"

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

    @property
    def own(self) -> list[int]:
        """Returns the result's axes that together are `[*stack, O]`."""
        return [*range(len(self.stack)), *result_axes(self.eqn, self.side)]

    def view(self) -> tuple[Step, ...]:
        """Returns the steps from the weight, as cut, to matrices `[*stack, O, I]`."""
        batch, free, contracted = operand_axes(self.eqn, self.side)
        return (
            *(self.weight.view or ()),
            ("transpose", (*batch, *free, *contracted)),
            ("reshape", (*self.stack, self.outputs, self.inputs)),
        )

    def right(self, a: Array) -> Array:
        """Returns the activation as `[*stack, B, T, I]`."""
        batch, free, contracted = operand_axes(self.eqn, 1 - self.side)
        rest = [i for i in free if i != self.example]
        a = lax.transpose(a, (*batch, self.example, *rest, *contracted))
        return a.reshape(*self.stack, self.examples, self.positions, self.inputs)

    def left(self, a: Array, g: Array) -> Array:
        """Returns the cotangent of the result as `[*stack, B, T, O]`."""
        del a
        batch, free, _ = operand_axes(self.eqn, 1 - self.side)
        outputs = result_axes(self.eqn, self.side)
        positions = result_axes(self.eqn, 1 - self.side)
        example = positions.pop(free.index(self.example))
        g = lax.transpose(g, (*range(len(batch)), example, *positions, *outputs))
        return g.reshape(*self.stack, self.examples, self.positions, self.outputs)

    def linear(self, a: Array, w: Array) -> Array:
        """Returns the product, which is linear in `a`."""
        return self.carried_out(a, w)


def product(
    weight: Weight, eqn: JaxprEqn, twin: JaxprEqn, side: int, examples: int
) -> Product | str:
    """Returns a parameter's product, or why it is no layer.

    Args:
      weight: the parameter.
      eqn: the `dot_general`.
      twin: the same equation of the program with twice the examples.
      side: which of its operands is the weight.
      examples: `B`.
    """
    if weight.view is None or grown(eqn, twin, side):
        return "broadcast before its product"
    example = example_axis(eqn, twin, 1 - side)
    if isinstance(example, str):
        return example
    _, free, _ = operand_axes(eqn, 1 - side)
    if example not in free:
        return MIXED
    return Product(eqn, side, weight, example, examples)


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
