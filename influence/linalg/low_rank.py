"""The nearest matrices of a low rank.

Exact where the shorter side is short: the singular vectors of that side are the
eigenvectors `v` of the product with the transpose, and `h v vᵀ` is the truncation, two
to three times faster than the whole SVD. The time of eigenvectors grows with the cube
of the side, so for longer ones the space of the leading ones is found by iteration from
a random one (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4), which
is matrix products. Either way `h` itself is projected: what is kept is exact, and only
the choice of what is kept can fall short.
"""

import jax
import jax.numpy as jnp
from jax import Array

from influence.linalg.basis import eigen
from influence.linalg.contract import contract

SHORT = 256
"""The longest side whose eigenvectors are all computed."""

MORE = 16
"""How many more directions than asked for are iterated."""

TURNS = 6
"""How often. Of singular values that fall as slowly as `i^(-1/4)`, what is lost is a
thousandth more than the least that can be at rank 32 (sides of 385 to 2,048), and four
thousandths at rank 128 (1,024)."""


def truncated(h_OxI: Array, rank: int) -> tuple[Array, Array]:
    """Returns `[..., O, R]` and `[..., I, R]`, whose product is nearest to matrices.

    The factor of the shorter side is orthonormal.

    Args:
      h_OxI: matrices, `[..., O, I]`.
      rank: `R`; at most the shorter side is returned.
    """
    if h_OxI.shape[-1] > h_OxI.shape[-2]:
        right, left = truncated(h_OxI.mT, rank)
        return left, right
    outputs, inputs = h_OxI.shape[-2:]
    if iterated(outputs, inputs, rank):
        v = _found(h_OxI, rank)
    else:
        v = leading(contract("...oi,...oj->...ij", h_OxI, h_OxI), rank)
    return contract("...oi,...ir->...or", h_OxI, v), v


def iterated(outputs: int, inputs: int, rank: int) -> bool:
    """Returns whether leading directions are found by iteration.

    Example:
      >>> from influence.linalg.low_rank import iterated
      >>> iterated(512, 128, 32), iterated(1536, 384, 32)
      (False, True)
    """
    side = min(outputs, inputs)
    return side > SHORT and 4 * (rank + MORE) <= side


def leading(square_NxN: Array, rank: int) -> Array:
    """Returns the eigenvectors of the largest eigenvalues, in columns."""
    _, q = eigen(square_NxN)
    return q[..., -rank:]


def _found(h_OxI: Array, rank: int) -> Array:
    """Returns the leading right singular vectors, in columns."""
    *many, _, side = h_OxI.shape
    random = jax.random.normal(jax.random.key(0), (side, rank + MORE), h_OxI.dtype)
    v = jnp.broadcast_to(jnp.linalg.qr(random)[0], (*many, side, rank + MORE))

    def turn(_: int, v: Array) -> Array:
        y = contract("...oi,...ir->...or", h_OxI, v)
        return jnp.linalg.qr(contract("...oi,...or->...ir", h_OxI, y))[0]

    v = jax.lax.fori_loop(0, TURNS, turn, v)
    y = contract("...oi,...ir->...or", h_OxI, v)
    return v @ leading(contract("...or,...os->...rs", y, y), rank)
