"""Vectors that multiply or shift: the scales and shifts of norms, lone biases.

Each entry of the parameter is an output of its own, and the input is a single one, so
`right = 1`; `left` is `g` for a shift and `g ⊙ x` for the scale of `x`. Entries may lie
in several axes: a table of positions added to every example is one long vector.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from influence.model.jaxprs import aval
from influence.model.use import Use, example_axis
from influence.model.weight import Weight
from influence.types import Step


@dataclass(frozen=True, eq=False)
class Elementwise(Use):
    """A use in which every entry of the parameter has entries of the result its own."""

    diagonal: ClassVar[tuple[bool, bool]] = (False, True)

    reshaped: ClassVar[str]
    """What is said of a parameter reshaped before such a use."""

    constant: ClassVar[str]
    """What is said of one combined with what is the same for every example."""

    @property
    def stack(self) -> tuple[int, ...]:
        """Returns `()`: one vector."""
        return ()

    @property
    def inputs(self) -> int:
        """Returns 1."""
        return 1

    @property
    def outputs(self) -> int:
        """Returns `O`, the number of entries."""
        return prod(self.weight.shape)

    @property
    def own(self) -> list[int]:
        """Returns the result's axes the entries lie in, in the parameter's order."""
        sources = self.weight.axes or ()
        own = {source: i for i, source in enumerate(sources) if source is not None}
        return [own[source] for source in sorted(own)]

    def view(self) -> tuple[Step, ...]:
        """Returns the steps from the weight, as cut, to a matrix `[O, 1]`."""
        return (("reshape", (self.outputs, 1)),)

    def right(self, a: Array) -> Array:
        """Returns ones, `[B, T, 1]`."""
        del a
        out = aval(self.out)
        positions = out.size // (self.examples * self.outputs)
        return jnp.ones((self.examples, positions, 1), out.dtype)

    def by_position(self, x: Array) -> Array:
        """Returns something of the result's shape as `[B, T, O]`."""
        rest = [i for i in range(x.ndim) if i not in self.own and i != self.example]
        x = lax.transpose(x, (self.example, *rest, *self.own))
        return x.reshape(self.examples, -1, self.outputs)


@dataclass(frozen=True, eq=False)
class Scale(Elementwise):
    """What a parameter multiplies entry by entry: `left = g ⊙ x`."""

    kind: ClassVar[str] = "scale"
    reshaped: ClassVar[str] = "reshaped before it is multiplied elementwise (`mul`)"
    constant: ClassVar[str] = (
        "multiplied elementwise by an array: apply a mask or the scale of a quantised "
        "weight to the activation instead, before or after the product"
    )

    def left(self, a: Array, g: Array) -> Array:
        """Returns the gradient of every entry at every position, `[B, T, O]`."""
        return self.by_position(g * a)

    def linear(self, a: Array, w: Array) -> Array:
        """Returns the scaled `a`."""
        return self.carried_out(a, w)


@dataclass(frozen=True, eq=False)
class Shift(Elementwise):
    """What a parameter is added to entry by entry: `left = g`."""

    kind: ClassVar[str] = "shift"
    reshaped: ClassVar[str] = "reshaped before it is added (`add`)"
    constant: ClassVar[str] = (
        "added to something that is the same for every example: write a merged "
        "`x @ (W + A B)` as `x @ W + (x @ A) @ B`"
    )

    def left(self, a: Array, g: Array) -> Array:
        """Returns the cotangent of the result as `[B, T, O]`."""
        del a
        return self.by_position(g)

    def linear(self, a: Array, w: Array) -> Array:
        """Returns `a` without the shift."""
        del w
        return jnp.broadcast_to(a, aval(self.out).shape)


def elementwise(
    kind: type[Scale] | type[Shift],
    weight: Weight,
    eqn: JaxprEqn,
    twin: JaxprEqn,
    side: int,
    examples: int,
) -> Elementwise | str:
    """Returns the elementwise use of a parameter, or why it is no layer.

    Args:
      kind: what the equation does.
      weight: the parameter.
      eqn: the equation.
      twin: the same equation of the program with twice the examples.
      side: which of its operands is the weight.
      examples: `B`.
    """
    if weight.axes is None:
        return kind.reshaped
    example = example_axis(eqn, twin, 1 - side)
    if isinstance(example, str):
        return example if _grows(eqn, twin) else kind.constant
    return kind(eqn, side, weight, example, examples)


def _grows(eqn: JaxprEqn, twin: JaxprEqn) -> bool:
    return aval(eqn.outvars[0]).shape != aval(twin.outvars[0]).shape
