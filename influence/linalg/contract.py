"""Sums of products that do not lose what they add up."""

from typing import Any

import jax
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


def inner(x_NxD: Array, y_MxD: Array) -> Array:
    """Returns the inner products of some vectors with others, `[N, M]`.

    With the more of them on the left: products of 4 long vectors with 32 take XLA up to
    four times as long on a CPU as those of the 32 with the 4.
    """
    if len(x_NxD) >= len(y_MxD):
        return contract("nd,md->nm", x_NxD, y_MxD)
    products_MxN = contract("md,nd->mn", y_MxD, x_NxD)
    # XLA would exchange the sides of a product whose transpose is all that is read.
    return jax.lax.optimization_barrier(products_MxN).T


STRIPS, WIDE = 4, 256
"""Into how many strips a Gram matrix is cut, if it is at least so wide."""


def gram(x_NxI: Array) -> Array:
    """Returns `xᵀ x`, accumulated in float32 at least."""
    return mirrored(half(x_NxI, x_NxI))


def half(x_NxI: Array, y_NxI: Array) -> Array:
    """Returns `xᵀ y`, which is symmetric, on and above its diagonal at least.

    Of four strips of rows each begins at the diagonal: 5/8 of the multiplications. Sums
    of such halves are `mirrored` once, at the end.

    Args:
      x_NxI: vectors.
      y_NxI: the same ones, each by a weight.
    """
    size = x_NxI.shape[-1]
    step = -(-size // STRIPS) if size >= WIDE else size
    strips = []
    for start in range(0, size, step):
        own, rest = y_NxI[:, start : start + step], x_NxI[:, start:]
        strip = contract("ni,nj->ij", own, rest)
        strips.append(jnp.pad(strip, ((0, 0), (start, 0))))
    return jnp.concatenate(strips) if len(strips) > 1 else strips[0]


def mirrored(half_IxI: Array) -> Array:
    """Returns symmetric matrices, given on and above their diagonals."""
    return jnp.triu(half_IxI) + jnp.triu(half_IxI, 1).mT


def multiply(x: Array, y: Array) -> Array:
    """Returns the matrix product `x @ y`, accumulated in float32 at least."""
    into = wide(x.dtype, y.dtype)
    if x.dtype != y.dtype:
        x, y = x.astype(into), y.astype(into)
    return jnp.matmul(x, y, preferred_element_type=into)
