"""A convolution: a matrix product at every place its window stops at.

`left = g`, and `right` is the patch of the input under the window (Grosse & Martens
2016), so the places are the positions. Groups of features are a stack of matrices.
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
class Convolution(Use):
    """The convolution of an input with a kernel."""

    kind: ClassVar[str] = "convolution"

    @property
    def stack(self) -> tuple[int, ...]:
        """Returns the number of feature groups, if there are several."""
        groups = self.eqn.params["feature_group_count"]
        return () if groups == 1 else (groups,)

    @property
    def inputs(self) -> int:
        """Returns `I`, the length of a patch within its group."""
        return aval(self.operand).size // prod((*self.stack, self.outputs))

    @property
    def outputs(self) -> int:
        """Returns `O`, the features of a group."""
        features = aval(self.out).shape[self._out[1]]
        return features // self.eqn.params["feature_group_count"]

    @property
    def own(self) -> list[int]:
        """Returns the result's feature axis, which is `[*stack, O]`."""
        return [self._out[1]]

    @property
    def _out(self) -> tuple[int, ...]:
        return tuple(self.eqn.params["dimension_numbers"].out_spec)

    def view(self) -> tuple[Step, ...]:
        """Returns the steps from the weight, as cut, to matrices `[*stack, O, I]`."""
        return (
            *(self.weight.view or ()),
            ("transpose", tuple(self.eqn.params["dimension_numbers"].rhs_spec)),
            ("reshape", (*self.stack, self.outputs, self.inputs)),
        )

    def right(self, a: Array) -> Array:
        """Returns the patches, `[*stack, B, T, I]`."""
        options = self.eqn.params
        spec = options["dimension_numbers"]
        window = [aval(self.operand).shape[i] for i in spec.rhs_spec[2:]]
        patches = lax.conv_general_dilated_patches(
            lax.transpose(a, spec.lhs_spec),
            window,
            options["window_strides"],
            options["padding"],
            options["lhs_dilation"],
            options["rhs_dilation"],
            # It is a convolution with ones and zeros, which must not round.
            precision=lax.Precision.HIGHEST,
        )
        return self._by_position(patches, self.inputs)

    def left(self, a: Array, g: Array) -> Array:
        """Returns the cotangent of the result as `[*stack, B, T, O]`."""
        del a
        return self._by_position(lax.transpose(g, self._out), self.outputs)

    def _by_position(self, x: Array, length: int) -> Array:
        """Returns `[N, features, *places]` as `[*stack, B, T, length]`."""
        groups = self.eqn.params["feature_group_count"]
        n, _, *places = x.shape
        x = x.reshape(n, groups, length, prod(places))
        x = lax.transpose(x, (1, 0, 3, 2))
        return x.reshape(*self.stack, self.examples, -1, length)

    def linear(self, a: Array, w: Array) -> Array:
        """Returns the convolution, which is linear in `a`."""
        return self.carried_out(a, w)


def convolution(
    weight: Weight, eqn: JaxprEqn, twin: JaxprEqn, side: int, examples: int
) -> Convolution | str:
    """Returns the convolution with a parameter, or why it is no layer.

    Args:
      weight: the parameter.
      eqn: the `conv_general_dilated`.
      twin: the same equation of the program with twice the examples.
      side: which of its operands is the weight.
      examples: `B`.
    """
    if side == 0:
        return "convolved as the input, not as the kernel"
    if eqn.params["batch_group_count"] > 1:
        return "the kernel of a convolution with `batch_group_count` above 1"
    if weight.view is None or grown(eqn, twin, side):
        return "broadcast before its convolution"
    example = example_axis(eqn, twin, 0)
    if isinstance(example, str):
        return example
    if example != eqn.params["dimension_numbers"].lhs_spec[0]:
        return MIXED
    return Convolution(eqn, side, weight, example, examples)
