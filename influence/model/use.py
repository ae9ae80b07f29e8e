"""One use a model makes of a parameter, whatever kind it is.

Of every example it contributes `DW = Σ_t left_t right_tᵀ` to the gradient of the
layer's matrix, `left_BxTxO` being what flows back and `right_BxTxI` what went in. For a
matrix product they are `g` and `a`; the modules beside this one say what they are for
convolutions, lookups, scales and shifts.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

from jax import Array
from jax.extend.core import JaxprEqn, Var

from influence.model import jaxprs
from influence.model.jaxprs import aval
from influence.model.weight import Axes, Weight
from influence.types import Step

MIXED = "its use mixes the examples: they can't be told apart"


@dataclass(frozen=True, eq=False)
class Use(abc.ABC):
    """One equation that a parameter and something of the examples go into.

    Attributes:
      eqn: the equation.
      side: which of its operands is the weight, 0 or 1.
      weight: the parameter behind that operand.
      example: the axis of the other operand that holds the examples; it may hold
        several positions of each, example by example.
      examples: `B`.
    """

    eqn: JaxprEqn
    side: int
    weight: Weight
    example: int
    examples: int

    kind: ClassVar[str]
    """What `Layer.kind` is of a layer used in this way."""

    diagonal: ClassVar[tuple[bool, bool]] = (False, False)
    """What `Layer.diagonal` is."""

    @property
    def out(self) -> Var:
        """Returns the variable that holds the result."""
        return self.eqn.outvars[0]

    @property
    def activation(self) -> Var:
        """Returns the variable that holds what the parameter is combined with."""
        return cast(Var, self.eqn.invars[1 - self.side])

    @property
    def operand(self) -> Var:
        """Returns the variable that holds the rearranged weight."""
        return cast(Var, self.eqn.invars[self.side])

    @property
    @abc.abstractmethod
    def stack(self) -> tuple[int, ...]:
        """Returns how many matrices are used side by side, as lengths of axes."""

    @property
    @abc.abstractmethod
    def inputs(self) -> int:
        """Returns `I`."""

    @property
    @abc.abstractmethod
    def outputs(self) -> int:
        """Returns `O`."""

    @property
    @abc.abstractmethod
    def own(self) -> list[int]:
        """Returns the result's axes that together are `[*stack, O]`."""

    @abc.abstractmethod
    def view(self) -> tuple[Step, ...]:
        """Returns the steps from the weight, as cut, to matrices `[*stack, O, I]`."""

    @abc.abstractmethod
    def right(self, a: Array) -> Array:
        """Returns what went in, `[*stack, B, T, I]`."""

    @abc.abstractmethod
    def left(self, a: Array, g: Array) -> Array:
        """Returns what flows back, `[*stack, B, T, O]`, given the result's `g`."""

    @abc.abstractmethod
    def linear(self, a: Array, w: Array) -> Array:
        """Returns the part of the result that is linear in `a`."""

    def carried_out(self, a: Array, w: Array) -> Array:
        """Returns the result as the model wrote it."""
        (out,) = jaxprs.bind(self.eqn, (a, w) if self.side else (w, a))
        return out

    def bias_view(self, bias: Weight, axes: Axes) -> tuple[Step, ...] | None:
        """Returns the steps from a bias to vectors `[*stack, O]`, if it is one.

        A bias has one entry per output, the same at every position.

        Args:
          bias: what is added to the result.
          axes: for each axis of the sum, the axis of the result it came from.
        """
        if bias.axes is None or len(bias.axes) != len(axes):
            return None
        if (bias.scans, bias.factor) != (self.weight.scans, self.weight.factor):
            return None
        source = dict(zip(axes, bias.axes, strict=True))
        length = aval(self.out).shape
        missing = any(source.get(i) is None and length[i] != 1 for i in self.own)
        elsewhere = any(
            i is not None for axis, i in source.items() if axis not in self.own
        )
        if missing or elsewhere:
            return None
        order = [i for axis in self.own if (i := source.get(axis)) is not None]
        units = [i for i in range(len(bias.shape)) if i not in order]
        return bias.below(
            ("transpose", (*order, *units)),
            ("reshape", (*self.stack, self.outputs)),
        )


class Contribution(NamedTuple):
    """A use of a layer's weight.

    Attributes:
      use: the use.
      turned: whether it sees the matrix transposed, so that its `left` belongs to the
        layer's inputs and its `right` to the layer's outputs.
    """

    use: Use
    turned: bool


def grown(eqn: JaxprEqn, twin: JaxprEqn, side: int) -> list[int]:
    """Returns the axes of an operand that are longer with twice the examples."""
    before, after = aval(eqn.invars[side]).shape, aval(twin.invars[side]).shape
    return [i for i, size in enumerate(before) if size != after[i]]


def example_axis(eqn: JaxprEqn, twin: JaxprEqn, side: int) -> int | str:
    """Returns the one axis of an operand that holds the examples, or why there is none.

    Args:
      eqn: the equation.
      twin: the same equation of the program with twice the examples.
      side: which operand.
    """
    axes = grown(eqn, twin, side)
    if not axes:
        return "combined with something that is the same for every example"
    before, after = (aval(x.invars[side]).shape for x in (eqn, twin))
    if len(axes) > 1 or after[axes[0]] != 2 * before[axes[0]]:
        return MIXED
    return axes[0]
