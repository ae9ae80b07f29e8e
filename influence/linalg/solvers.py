"""Iterative solutions of `A x = b`, for operators that can only be multiplied with.

Vectors are pytrees of arrays, every one with a leading axis of right-hand sides: all
are solved at once, each with step lengths of its own, so that one product with the
operator serves them all. A solver hands out its state after every step; whoever runs it
decides when to stop, and shows progress meanwhile.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Vector = Any
"""A pytree of arrays `[Q, …]`: one vector for each right-hand side."""

Operator = Callable[[Vector], Vector]
"""A symmetric positive definite operator, on all right-hand sides at once."""


class Step(NamedTuple):
    """Where a solver is.

    Attributes:
      x: the solutions so far.
      residual_Q: `|b - A x| / |b|` as the solver knows it, or `nan` if it does not.
    """

    x: Vector
    residual_Q: Array


def conjugate_gradients(
    multiply: Operator, precondition: Operator, b: Vector
) -> Iterator[Step]:
    """Yields the steps of preconditioned conjugate gradients, from `x = P b`, for ever.

    (Hestenes & Stiefel 1952.) A right-hand side whose search direction has no positive
    curvature left, as rounding makes it, stays where it is.

    Args:
      multiply: `A`.
      precondition: `P ≈ A⁻¹`.
      b: the right-hand sides.
    """
    norm_Q = jnp.sqrt(dot(b, b))
    x = precondition(b)
    r = add(b, -jnp.ones_like(norm_Q), multiply(x))
    z = precondition(r)
    p, rz_Q = z, dot(r, z)
    while True:
        yield Step(x, jnp.sqrt(dot(r, r)) / norm_Q)
        product = multiply(p)
        curved_Q = dot(p, product)
        able_Q = (curved_Q > 0) & (rz_Q > 0)
        alpha_Q = jnp.where(able_Q, rz_Q / jnp.where(able_Q, curved_Q, 1), 0)
        x = add(x, alpha_Q, p)
        r = add(r, -alpha_Q, product)
        z = precondition(r)
        before_Q, rz_Q = rz_Q, dot(r, z)
        beta_Q = jnp.where(able_Q, rz_Q / jnp.where(able_Q, before_Q, 1), 0)
        p = add(z, beta_Q, p)


def neumann(
    operators: Iterator[Operator],
    precondition: Operator,
    b: Vector,
    rates: Iterator[float],
    momentum: float,
) -> Iterator[Step]:
    """Yields the steps of a preconditioned Neumann series with momentum, for ever.

        x ← x - rate · P (A x - b)

    (ASTRA, Wang et al. 2025.) Each step may see the operator on another batch.

    Args:
      operators: `A`, step by step.
      precondition: `P ≈ A⁻¹`.
      b: the right-hand sides.
      rates: step by step.
      momentum: how much of the last move is made again.
    """
    norm_Q = jnp.sqrt(dot(b, b))
    one_Q = jnp.ones_like(norm_Q)
    x = precondition(b)
    move = jax.tree.map(jnp.zeros_like, x)
    for multiply, rate in zip(operators, rates, strict=False):
        r = add(b, -one_Q, multiply(x))
        yield Step(x, jnp.sqrt(dot(r, r)) / norm_Q)
        step = precondition(r)
        move = add(jax.tree.map(lambda y: momentum * y, move), rate * one_Q, step)
        x = add(x, one_Q, move)


def lissa(operators: Iterator[Operator], b: Vector, rate: float) -> Iterator[Step]:
    """Yields the steps of LiSSA, `r ← b + (I - rate · A) r`, `x = rate · r`, for ever.

    (Agarwal et al. 2017; for influence functions Koh & Liang 2017.) It converges if no
    eigenvalue of `A` is above `2 / rate`.

    Args:
      operators: `A`, step by step.
      b: the right-hand sides.
      rate: of the series.
    """
    norm_Q = jnp.sqrt(dot(b, b))
    one_Q = jnp.ones_like(norm_Q)
    x = jax.tree.map(lambda y: rate * y, b)
    for multiply in operators:
        r = add(b, -one_Q, multiply(x))
        yield Step(x, jnp.sqrt(dot(r, r)) / norm_Q)
        x = add(x, rate * one_Q, r)


class Krylov(NamedTuple):
    """A function of an operator, applied to vectors.

    Attributes:
      x: `f(A) b`.
      last_Q: how much of `|x|` the last step added, for each right-hand side.
    """

    x: Vector
    last_Q: Array


def krylov(
    multiply: Operator,
    precondition: Operator,
    function: Callable[[Array], Array],
    b: Vector,
    steps: int,
    *,
    shift: float = 0.0,
) -> Krylov:
    """Returns `f(A) b` from the space of `steps` preconditioned products.

        f(A) b ≈ V f(T) Vᵀ b,   T = Vᵀ A V

    with `V` an orthonormal basis of what conjugate gradients for `A + shift` would
    search, `(P (A + shift))ᵏ P b`: for `f(λ) = 1 / (λ + shift)` it is what they find.
    Without a preconditioner it is the method of Lanczos 1950. The basis is made
    orthogonal again at every step, and held: `steps` vectors for each right-hand side.

    Args:
      multiply: `A`.
      precondition: `P ≈ (A + shift)⁻¹`.
      function: `f`, of eigenvalues.
      b: the right-hand sides.
      steps: how many products; fewer are enough where `f` is smooth, and where `P` is
        near.
      shift: what the preconditioner adds to `A`.
    """
    ones_Q = jnp.ones_like(dot(b, b))
    basis, columns, direction = [], [], b
    for _ in range(steps):
        basis.append(_beside(basis, precondition(direction)))
        product = multiply(basis[-1])
        columns.append([dot(product, u) for u in basis])
        direction = add(product, shift * ones_Q, basis[-1])
    t_QxKxK = _symmetric(columns)
    values_QxK, q_QxKxK = jnp.linalg.eigh(t_QxKxK)
    b_QxK = jnp.stack([dot(u, b) for u in basis], 1)
    weights_QxK = jnp.einsum("qkj,qk->qj", q_QxKxK, b_QxK)
    weights_QxK = weights_QxK * function(jnp.maximum(values_QxK, 0))
    found_QxK = jnp.einsum("qkj,qj->qk", q_QxKxK, weights_QxK)
    x = _scaled(basis[0], found_QxK[:, 0])
    for k in range(1, steps):
        x = add(x, found_QxK[:, k], basis[k])
    total_Q = jnp.sqrt((found_QxK**2).sum(1))
    last_Q = jnp.abs(found_QxK[:, -1])
    return Krylov(x, last_Q / jnp.where(total_Q > 0, total_Q, 1))


def _beside(basis: list[Vector], x: Vector) -> Vector:
    """Returns what `x` adds to an orthonormal basis, of length one; zero if nothing."""
    before_Q = jnp.sqrt(dot(x, x))
    # Twice: what rounding leaves of the first pass is as large as what was removed.
    for _ in range(2):
        for u in basis:
            x = add(x, -dot(x, u), u)
    length_Q = jnp.sqrt(dot(x, x))
    able_Q = length_Q > 10 * jnp.finfo(length_Q.dtype).eps * before_Q
    return _scaled(x, jnp.where(able_Q, 1 / jnp.where(able_Q, length_Q, 1), 0))


def _symmetric(columns: list[list[Array]]) -> Array:
    """Returns `[Q, K, K]` from the columns of its upper half, each of arrays `[Q]`."""
    zero_Q = jnp.zeros_like(columns[0][0])
    padded = [x + [zero_Q] * (len(columns) - len(x)) for x in columns]
    upper_QxKxK = jnp.asarray(padded).transpose(2, 1, 0)
    return upper_QxKxK + jnp.triu(upper_QxKxK, 1).mT


def _scaled(x: Vector, scale_Q: Array) -> Vector:
    return add(jax.tree.map(jnp.zeros_like, x), scale_Q, x)


@jax.jit
def dot(x: Vector, y: Vector) -> Array:
    """Returns the inner product of each right-hand side's vectors, `[Q]`.

    Compiled, so that what is multiplied is added up without being kept.
    """
    parts = jax.tree.map(lambda x, y: (x * y).sum(tuple(range(1, x.ndim))), x, y)
    return jnp.stack(jax.tree.leaves(parts)).sum(0)


@jax.jit
def add(x: Vector, scale_Q: Array, y: Vector) -> Vector:
    """Returns `x + scale · y`, with a scale for each right-hand side or one for all.

    Compiled for the same reason.
    """

    def leaf(x: Array, y: Array) -> Array:
        scale = scale_Q.astype(y.dtype).reshape(-1, *[1] * (y.ndim - 1))
        return x + scale * y

    return jax.tree.map(leaf, x, y)
