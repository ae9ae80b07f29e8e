"""Sums of products that do not lose what they add up."""

from typing import Any

import jax.numpy as jnp
from jax import Array


def wide(*dtypes: Any) -> Any:
    """Returns the widest of some floating types, float32 at least."""
    return max(*dtypes, jnp.float32, key=lambda x: jnp.finfo(x).bits)


def contract(subscripts: str, *operands: Array) -> Array:
    """Returns `einsum(subscripts, *operands)`, accumulated in float32 at least.

    Operands of one narrow type stay so and only the sums are wide, which is the fast
    way where the device multiplies bfloat16; operands of several types are widened
    first. A bfloat16 accumulator stops growing after a few hundred terms of like size,
    so none is ever used.
    """
    kinds = {x.dtype for x in operands}
    into = wide(*kinds)
    if len(kinds) > 1:
        operands = tuple(x.astype(into) for x in operands)
    return jnp.einsum(subscripts, *operands, preferred_element_type=into)


def multiply(x: Array, y: Array) -> Array:
    """Returns the matrix product `x @ y`, accumulated in float32 at least."""
    into = wide(x.dtype, y.dtype)
    if x.dtype != y.dtype:
        x, y = x.astype(into), y.astype(into)
    return jnp.matmul(x, y, preferred_element_type=into)
