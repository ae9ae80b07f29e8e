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


STRIPS, WIDE = 4, 256
"""Into how many strips a Gram matrix is cut, if it is at least so wide."""


def gram(x_NxI: Array) -> Array:
    """Returns `xᵀ x`, accumulated in float32 at least.

    It is symmetric, so of four strips of rows each begins at the diagonal: 5/8 of the
    multiplications.
    """
    size = x_NxI.shape[-1]
    step = -(-size // STRIPS) if size >= WIDE else size
    strips = []
    for start in range(0, size, step):
        own, rest = x_NxI[:, start : start + step], x_NxI[:, start:]
        strip = contract("ni,nj->ij", own, rest)
        strips.append(jnp.pad(strip, ((0, 0), (start, 0))))
    upper = jnp.concatenate(strips) if len(strips) > 1 else strips[0]
    return jnp.triu(upper) + jnp.triu(upper, 1).mT


def multiply(x: Array, y: Array) -> Array:
    """Returns the matrix product `x @ y`, accumulated in float32 at least."""
    into = wide(x.dtype, y.dtype)
    if x.dtype != y.dtype:
        x, y = x.astype(into), y.astype(into)
    return jnp.matmul(x, y, preferred_element_type=into)
