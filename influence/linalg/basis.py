"""Coordinates for one side of a layer's matrices.

Eigenvectors of a covariance, of blocks along its diagonal (Grosse et al. 2023, appendix
A: the factors' memory shrinks by the number of blocks), or none at all: the standard
basis, for sides too long for a covariance and for sides whose covariance is diagonal.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.linalg import count
from influence.linalg.contract import multiply

Axis = Literal[-1, -2]
"""Which axis vectors are along: the rows of a matrix, or its columns."""


class Basis(NamedTuple):
    """A matrix `Q` of orthonormal columns, block by block along its diagonal.

    Attributes:
      blocks: eigenvectors, in columns, those of most variance last; `()` for the
        standard basis.
    """

    blocks: tuple[Array, ...]

    def into(self, x: Array, axis: Axis = -1) -> Array:
        """Returns the coordinates `Qᵀ x` of vectors along one of the last two axes."""
        return _each_block(x, self.blocks, axis)

    def out_of(self, x: Array, axis: Axis = -1) -> Array:
        """Returns the vectors `Q x` with coordinates along one of the last two axes."""
        return _each_block(x, [q.mT for q in self.blocks], axis)

    @property
    def work(self) -> int:
        """Returns the multiplications of turning one vector."""
        return count.onto(q.shape[-2:] for q in self.blocks)

    @property
    def whole(self) -> bool:
        """Returns whether there is a direction for each number of a vector."""
        return all(q.shape[-2] == q.shape[-1] for q in self.blocks)

    def directions(self, size: int) -> int:
        """Returns `K`, how many there are of a side of some size."""
        return sum(q.shape[-1] for q in self.blocks) if self.blocks else size

    def leading(self, share: float) -> "Basis":
        """Returns the directions of most variance of every block: so many of them."""
        kept = [math.ceil(share * q.shape[-1]) for q in self.blocks]
        pairs = zip(self.blocks, kept, strict=True)
        return Basis(tuple(q[..., q.shape[-1] - n :] for q, n in pairs))

    def dense(self, size: int) -> Array:
        """Returns `Q`, `[*stack, N, K]`; the standard basis without a stack."""
        dtype = self.blocks[0].dtype if self.blocks else None
        return self.into(jnp.eye(size, dtype=dtype))


def turn(v_OxI: Array, outputs: Basis, inputs: Basis) -> Array:
    """Returns matrices with either side turned: `Q_Sᵀ V Q_A`.

    Neither product is of a transpose: as one of rows, the second takes XLA up to a
    fifth longer on a CPU, and devices along a model exchange what is transposed.
    """
    return outputs.into(inputs.into(v_OxI), axis=-2)


def _each_block(x: Array, blocks: Sequence[Array], axis: Axis) -> Array:
    """Returns the products of parts of vectors and blocks, in one row."""
    if not blocks:
        return x
    ends = list(accumulate(q.shape[-2] for q in blocks))
    parts = jnp.split(x, ends[:-1], axis=axis)
    found = [_onto(y, q, axis) for y, q in zip(parts, blocks, strict=True)]
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=axis)


def _onto(x: Array, q_NxK: Array, axis: Axis) -> Array:
    """Returns the products of vectors with the columns of a matrix."""
    return multiply(x, q_NxK) if axis == -1 else multiply(q_NxK.mT, x)


def split(size: int, blocks: int, widest: int) -> tuple[int, ...]:
    """Returns the lengths of the blocks a side of some size is cut into.

    `()`, the standard basis, if even one block would be longer than `widest`.
    """
    lengths = [len(x) for x in np.array_split(np.arange(size), min(blocks, size))]
    return tuple(lengths) if lengths[0] <= widest else ()


def eigen(covariance_NxN: Array) -> tuple[Array, Array]:
    """Returns a symmetric matrix's eigenvalues, ascending, and vectors, in columns.

    Computed in float64 whatever the matrix is in, where the device can: directions of
    little variance are where float32 loses its digits, and where a damped inverse
    amplifies most.
    """
    wide = jnp.float32 if jax.default_backend() == "tpu" else jnp.float64
    with jax.enable_x64(True):
        values, q = jnp.linalg.eigh(covariance_NxN.astype(wide), symmetrize_input=True)
        dtype = covariance_NxN.dtype
        return values.astype(dtype), q.astype(dtype)
