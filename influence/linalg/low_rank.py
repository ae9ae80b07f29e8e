"""The nearest matrices of a low rank.

Exact where the shorter side is short: the singular vectors of that side are the
eigenvectors `v` of the product with the transpose, and `h v vᵀ` is the truncation, two
to three times faster than the whole SVD. The time of eigenvectors grows with the cube
of the side, so for longer ones the space of the leading ones is found by iteration from
a random one (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4), which
is matrix products: by `h` and back, or, if that is less work, by their product, formed
once. Either way `h` itself is projected: what is kept is exact, and only the choice of
what is kept can fall short.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from influence.linalg import count
from influence.linalg.basis import eigen
from influence.linalg.contract import contract, gram

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
        v = leading(_gram(h_OxI), rank)
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
    *many, long, side = h_OxI.shape
    act = _squared(h_OxI) if squared(long, side, rank) else _there_and_back(h_OxI)
    random = jax.random.normal(jax.random.key(0), (side, rank + MORE), h_OxI.dtype)
    v = jnp.broadcast_to(jnp.linalg.qr(random)[0], (*many, side, rank + MORE))

    def turn(_: int, v: Array) -> Array:
        return jnp.linalg.qr(act(v))[0]

    v = jax.lax.fori_loop(0, TURNS, turn, v)
    y = contract("...oi,...ir->...or", h_OxI, v)
    return v @ leading(contract("...or,...os->...rs", y, y), rank)


def squared(long: int, side: int, rank: int) -> bool:
    """Returns whether `hᵀ h` is formed for the iteration, as less work.

    What float32 then loses are directions of less than a ten-millionth of the energy.

    Example:
      >>> from influence.linalg.low_rank import squared
      >>> squared(1536, 384, 32), squared(4096, 4096, 32)
      (True, False)
    """
    formed, by_products = _turns(long, side, rank)
    return formed <= by_products


def operations(outputs: int, inputs: int, rank: int) -> int:
    """Returns the operations of finding one matrix's leading directions."""
    long, side = max(outputs, inputs), min(outputs, inputs)
    if not iterated(outputs, inputs, rank):
        return 2 * count.gram(long, side) + count.eigen(side)
    found = rank + MORE
    turns = 2 * min(_turns(long, side, rank)) + 4 * TURNS * side * found**2
    return turns + 2 * long * side * found + count.eigen(found)


def _turns(long: int, side: int, rank: int) -> tuple[int, int]:
    """Returns the multiplications of all turns with `hᵀ h` formed, and without."""
    found = rank + MORE
    formed = count.gram(long, side) + TURNS * side**2 * found
    return formed, TURNS * 2 * long * side * found


def _squared(h_OxI: Array) -> Callable[[Array], Array]:
    """Returns `v -> hᵀ h v`, by the matrix `hᵀ h`."""
    return partial(contract, "...ij,...jr->...ir", _gram(h_OxI))


def _there_and_back(h_OxI: Array) -> Callable[[Array], Array]:
    """Returns `v -> hᵀ h v`, by two products."""

    def act(v: Array) -> Array:
        y = contract("...oi,...ir->...or", h_OxI, v)
        return contract("...oi,...or->...ir", h_OxI, y)

    return act


def _gram(h_OxI: Array) -> Array:
    """Returns `hᵀ h` of each matrix."""
    form = gram
    for _ in h_OxI.shape[:-2]:
        form = jax.vmap(form)
    return form(h_OxI)
