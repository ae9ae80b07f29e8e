"""An embedding lookup: the product with a one-hot vector, never carried out as one.

`left = g`, and `right` is the one-hot of the id. It is as large as logits would be, and
its covariance is diagonal in the standard basis: how often each id was looked up.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from influence.model.jaxprs import aval
from influence.model.use import MIXED, Use, example_axis
from influence.model.weight import Weight
from influence.types import Step


@dataclass(frozen=True, eq=False)
class Lookup(Use):
    """A `gather` of whole rows; `activation` is the ids, in a trailing axis."""

    kind: ClassVar[str] = "embedding"
    diagonal: ClassVar[tuple[bool, bool]] = (True, False)

    @property
    def stack(self) -> tuple[int, ...]:
        """Returns `()`: one table."""
        return ()

    @property
    def inputs(self) -> int:
        """Returns `I`, the number of rows."""
        return aval(self.operand).shape[0]

    @property
    def outputs(self) -> int:
        """Returns `O`, the length of a row."""
        return prod(aval(self.operand).shape[1:])

    @property
    def own(self) -> list[int]:
        """Returns the result's axes that are a row."""
        return list(self.eqn.params["dimension_numbers"].offset_dims)

    def view(self) -> tuple[Step, ...]:
        """Returns the steps from the weight, as cut, to a matrix `[O, I]`."""
        return (
            *(self.weight.view or ()),
            ("reshape", (self.inputs, self.outputs)),
            ("transpose", (1, 0)),
        )

    def right(self, a: Array) -> Array:
        """Returns the ids one-hot, `[B, T, I]`; zeros for an id that has no row."""
        numbers = self.eqn.params["dimension_numbers"]
        ids = a[..., numbers.start_index_map.index(0)]
        if self.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
            ids = jnp.clip(ids, 0, self.inputs - 1)
        ids = jnp.moveaxis(ids, self.example, 0).reshape(self.examples, -1)
        return jax.nn.one_hot(ids, self.inputs, dtype=aval(self.out).dtype)

    def left(self, a: Array, g: Array) -> Array:
        """Returns the cotangent of the result as `[B, T, O]`."""
        del a
        places = [i for i in range(g.ndim) if i not in self.own]
        example = places.pop(self.example)
        g = lax.transpose(g, (example, *places, *self.own))
        return g.reshape(self.examples, -1, self.outputs)

    def linear(self, a: Array, w: Array) -> Array:
        """Returns zeros: nothing is linear in ids."""
        del a, w
        return jnp.zeros_like(aval(self.out))


def lookup(
    weight: Weight, eqn: JaxprEqn, twin: JaxprEqn, side: int, examples: int
) -> Lookup | str:
    """Returns the lookup of a parameter's rows, or why it is no layer.

    Args:
      weight: the parameter.
      eqn: the `gather`.
      twin: the same equation of the program with twice the examples.
      side: which of its operands is the weight.
      examples: `B`.
    """
    numbers, shape = eqn.params["dimension_numbers"], aval(eqn.invars[0]).shape
    rows = eqn.params["slice_sizes"] == (1, *shape[1:])
    # An id beside that of the row can only be clipped to zero, as all of that axis is
    # taken.
    alone = numbers.start_index_map == (0,) or (
        0 in numbers.start_index_map
        and eqn.params["mode"] == lax.GatherScatterMode.CLIP
    )
    if side != 0 or not rows or not alone or weight.view is None:
        return "looked up (`gather`), but not in whole rows of its first axis"
    example = example_axis(eqn, twin, 1)
    if isinstance(example, str):
        return (
            "looked up by ids that are the same for every example: broadcast the ids "
            "to all examples first, as `jnp.broadcast_to(positions, tokens.shape)`"
            if example != MIXED
            else MIXED
        )
    return Lookup(eqn, side, weight, example, examples)
