"""The forms a block of queries is kept in, and how large ones are made small.

A query is a matrix per layer. Kept whole it is *dense*; as a truncated SVD it is
*factored*, and a training token is scored without its gradient (Grosse et al.
2023); in a *joint* basis of all queries of a layer a training token is
projected once for all of them.

Queries are made small in their curvature's eigenbasis, where the inverse leaves them:
only what is left is turned back. Singular values are the same there.

What to truncate: a score is `⟨h, DW⟩` and `DW` is large where there is much curvature,
so that the error which matters is that of `h` weighted by the roots of the curvature's
eigenvalues. `Whitened` and `Joint` scale rows and columns by them before they truncate
and undo it after; `Plain` does not.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from influence.linalg.kronecker import Kronecker
from influence.linalg.low_rank import leading, truncated

FLOOR = 1e-4
"""Of the mean: the least curvature a scaling is divided by."""


class Dense(NamedTuple):
    """Queries as matrices, `[*stack, Q, O, I]`."""

    h_QxOxI: Array


class Factored(NamedTuple):
    """Queries as `left rightᵀ`: `[*stack, Q, O, R]` and `[*stack, Q, I, R]`."""

    left_QxOxR: Array
    right_QxIxR: Array


class Projected(NamedTuple):
    """Queries as `left core rightᵀ` in bases that all of them share.

    `[*stack, O, R]`, `[*stack, I, R]` and cores `[*stack, Q, R, R]`.
    """

    left_OxR: Array
    right_IxR: Array
    core_QxRxR: Array


Form = Dense | Factored | Projected

Reform = Callable[[Form], Form]
"""`dense` or `factored`."""


def dense(form: Form) -> Dense:
    """Returns queries as matrices."""
    if isinstance(form, Dense):
        return form
    if isinstance(form, Factored):
        return Dense(form.left_QxOxR @ form.right_QxIxR.mT)
    left, right = form.left_OxR[..., None, :, :], form.right_IxR[..., None, :, :]
    return Dense(left @ form.core_QxRxR @ right.mT)


def factored(form: Form) -> Factored:
    """Returns queries as factors, one of them orthonormal; nothing is lost."""
    if isinstance(form, Factored):
        return form
    h_QxOxI = dense(form).h_QxOxI
    return Factored(*truncated(h_QxOxI, min(h_QxOxI.shape[-2:])))


class Compressed(NamedTuple):
    """Queries made small.

    Attributes:
      form: the queries.
      energy_Q: each query's square norm before, as the compression weighs it.
      kept_Q: and after.
    """

    form: Form
    energy_Q: Array
    kept_Q: Array


@jax.jit(static_argnums=(0, 1))
def formed(
    compress: "Compress | None", stack: int, block: Kronecker, c_QxOxI: Array
) -> Compressed:
    """Returns a layer's queries as they are kept, axis `Q` behind the stack.

    Args:
      compress: how they are made small; None keeps matrices.
      stack: how many axes the layer is stacked along.
      block: the layer's curvature.
      c_QxOxI: the queries in its eigenbasis, `[Q, *stack, O, I]`.
    """
    act = compress or _whole
    for _ in range(stack):
        act = jax.vmap(act)
    found = act(block, jnp.moveaxis(c_QxOxI, 0, stack))
    energy_Q, kept_Q = (
        x.sum(tuple(range(stack))) for x in (found.energy_Q, found.kept_Q)
    )
    return Compressed(found.form, energy_Q, kept_Q)


def total(norms: Sequence[Array]) -> Array:
    """Returns square norms over all layers, `[Q]`."""
    return jnp.stack(norms).sum(0)


def _whole(block: Kronecker, c_QxOxI: Array) -> Compressed:
    energy_Q = _energy(c_QxOxI)
    return Compressed(Dense(block.unrotate(c_QxOxI)), energy_Q, energy_Q)


class Compress(abc.ABC):
    """Makes the queries of one matrix small.

    Layers with a side no longer than the rank lose nothing.

    Attributes:
      rank: how many directions are kept.
      alone: whether what becomes of a query depends on no other.
    """

    rank: int
    alone: ClassVar[bool] = True

    @abc.abstractmethod
    def __call__(self, block: Kronecker, c_QxOxI: Array) -> Compressed:
        """Returns queries, compressed with the curvature in mind.

        Args:
          block: the matrix's curvature.
          c_QxOxI: the queries in its eigenbasis.
        """

    @abc.abstractmethod
    def __str__(self) -> str:
        """Says what the compression is."""

    def __post_init__(self) -> None:
        """Raises if the rank is none."""
        if self.rank < 1:
            raise ValueError(f"A query's rank must be 1 or more, not {self.rank}.")


@dataclass(frozen=True)
class Plain(Compress):
    """Truncates each query's SVD: the nearest matrices of a rank, as matrices.

    Those of long sides are found by iteration, and next to nearest (`low_rank`).

    Example:
      >>> from influence.attribution.forms import Plain
      >>> form = Plain(4)
      >>> small = influence.query(curvature, params, measurements, compress=form)
      >>> (kept,) = dict(small.facts)["energy_kept"]
      >>> 0.5 < kept <= 1
      True
    """

    rank: int

    def __call__(self, block: Kronecker, c_QxOxI: Array) -> Compressed:
        """Returns the queries, compressed."""
        left, right = truncated(c_QxOxI, self.rank)
        form = Factored(*block.factors(left, right))
        return Compressed(form, _energy(c_QxOxI), _energy_of(left, right))

    def __str__(self) -> str:
        """Says what the compression is."""
        return f"rank {self.rank}"


@dataclass(frozen=True)
class Whitened(Compress):
    """Truncates each query's SVD where the error of scores, not of matrices, is least.

    Rows and columns are scaled in the eigenbasis by the roots of the means of `Λ` along
    the other side: the product of two vectors that is closest to `Λ`.

    Example:
      >>> form = influence.Whitened(4)
      >>> small = influence.query(curvature, params, measurements, compress=form)
      >>> (kept,) = dict(small.facts)["energy_kept"]
      >>> 0.5 < kept <= 1
      True
    """

    rank: int

    def __call__(self, block: Kronecker, c_QxOxI: Array) -> Compressed:
        """Returns the queries, compressed."""
        rows_Ox1, columns_Ix1 = _scales(block)
        white = rows_Ox1[None] * c_QxOxI * columns_Ix1.mT[None]
        left, right = truncated(white, self.rank)
        form = Factored(
            *block.factors(left / rows_Ox1[None], right / columns_Ix1[None])
        )
        return Compressed(form, _energy(white), _energy_of(left, right))

    def __str__(self) -> str:
        """Says what the compression is."""
        return f"rank {self.rank}, whitened"


@dataclass(frozen=True)
class Joint(Compress):
    """Projects all queries of a layer onto one basis a side, in whitened coordinates.

    The bases are the leading eigenvectors of `Σ_q C_q C_qᵀ` and `Σ_q C_qᵀ C_q` (a
    higher-order SVD of the block). A training token is projected once for all queries,
    `R (O + I)` multiplications, and each query then costs `R²` a sequence; the rank has
    to grow with how different the queries are.

    Example:
      >>> from influence.attribution.forms import Joint
      >>> form = Joint(4)
      >>> small = influence.query(curvature, params, measurements, compress=form)
      >>> (kept,) = dict(small.facts)["energy_kept"]
      >>> 0.5 < kept <= 1
      True
    """

    rank: int
    alone: ClassVar[bool] = False

    def __call__(self, block: Kronecker, c_QxOxI: Array) -> Compressed:
        """Returns the queries, compressed."""
        rows_Ox1, columns_Ix1 = _scales(block)
        white = rows_Ox1[None] * c_QxOxI * columns_Ix1.mT[None]
        left = leading(jnp.einsum("qoi,qpi->op", white, white), self.rank)
        right = leading(jnp.einsum("qoi,qoj->ij", white, white), self.rank)
        core = left.mT[None] @ white @ right[None]
        form = Projected(*block.factors(left / rows_Ox1, right / columns_Ix1), core)
        return Compressed(form, _energy(white), _energy(core))

    def __str__(self) -> str:
        """Says what the compression is."""
        return f"joint basis of rank {self.rank}, whitened"


def _scales(block: Kronecker) -> tuple[Array, Array]:
    """Returns the roots of how much curvature each row and each column has."""
    lam = jnp.maximum(block.lam_OxI, 0)
    rows_Ox1, columns_Ix1 = (
        jnp.sqrt(jnp.maximum(x, FLOOR * lam.mean()))
        for x in (lam.mean(1, keepdims=True), lam.mean(0)[:, None])
    )
    return rows_Ox1, columns_Ix1 / jnp.sqrt(lam.mean())


def _energy(c_QxOxI: Array) -> Array:
    return (c_QxOxI**2).sum((-2, -1))


def _energy_of(left_QxOxR: Array, right_QxIxR: Array) -> Array:
    """Returns the square norms of `left rightᵀ`, which are not formed."""
    left, right = (x.mT @ x for x in (left_QxOxR, right_QxIxR))
    return (left * right).sum((-2, -1))
