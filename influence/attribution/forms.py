"""The forms a block of queries is kept in, and how large ones are made small.

A query is a matrix per layer. Kept whole it is *dense*; as a truncated SVD it is
*factored*, and a training token is scored without its gradient (Grosse et al.
2023); in a *joint* basis of all queries of a layer a training token is
projected once for all of them.

What to truncate: a score is `⟨h, DW⟩` and `DW` is large where there is much curvature,
so that the error which matters is that of `h` weighted by the roots of the curvature's
eigenvalues. `Whitened` and `Joint` scale rows and columns by them before they truncate
and undo it after; `Plain` does not.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
    return _truncated(h_QxOxI, min(h_QxOxI.shape[-2:]))


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


class Compress(abc.ABC):
    """Makes the queries of one matrix, `h_QxOxI`, small.

    Layers with a side no longer than the rank lose nothing.
    """

    rank: int

    @abc.abstractmethod
    def __call__(self, block: Kronecker, h_QxOxI: Array) -> Compressed:
        """Returns the queries, compressed with the curvature in mind."""

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

    def __call__(self, block: Kronecker, h_QxOxI: Array) -> Compressed:
        """Returns the queries, compressed."""
        del block
        form = _truncated(h_QxOxI, self.rank)
        return Compressed(form, _energy(h_QxOxI), _energy(dense(form).h_QxOxI))

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

    def __call__(self, block: Kronecker, h_QxOxI: Array) -> Compressed:
        """Returns the queries, compressed."""
        rows_Ox1, columns_Ix1 = _scales(block)
        white = rows_Ox1[None] * jax.vmap(block.rotate)(h_QxOxI) * columns_Ix1.mT[None]
        left, right = _truncated(white, self.rank)
        form = Factored(
            block.outputs.out_of((left / rows_Ox1[None]).mT).mT,
            block.inputs.out_of((right / columns_Ix1[None]).mT).mT,
        )
        return Compressed(form, _energy(white), _energy(left @ right.mT))

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

    def __call__(self, block: Kronecker, h_QxOxI: Array) -> Compressed:
        """Returns the queries, compressed."""
        rows_Ox1, columns_Ix1 = _scales(block)
        white = rows_Ox1[None] * jax.vmap(block.rotate)(h_QxOxI) * columns_Ix1.mT[None]
        left = leading(jnp.einsum("qoi,qpi->op", white, white), self.rank)
        right = leading(jnp.einsum("qoi,qoj->ij", white, white), self.rank)
        core = left.mT[None] @ white @ right[None]
        form = Projected(
            block.outputs.out_of((left / rows_Ox1).mT).mT,
            block.inputs.out_of((right / columns_Ix1).mT).mT,
            core,
        )
        return Compressed(form, _energy(white), _energy(core))

    def __str__(self) -> str:
        """Says what the compression is."""
        return f"joint basis of rank {self.rank}, whitened"


def _truncated(h_QxOxI: Array, rank: int) -> Factored:
    return Factored(*truncated(h_QxOxI, rank))


def _scales(block: Kronecker) -> tuple[Array, Array]:
    """Returns the roots of how much curvature each row and each column has."""
    lam = jnp.maximum(block.lam_OxI, 0)
    rows_Ox1, columns_Ix1 = (
        jnp.sqrt(jnp.maximum(x, FLOOR * lam.mean()))
        for x in (lam.mean(1, keepdims=True), lam.mean(0)[:, None])
    )
    return rows_Ox1, columns_Ix1 / jnp.sqrt(lam.mean())


def _energy(h_QxOxI: Array) -> Array:
    return (h_QxOxI**2).sum((-2, -1))
