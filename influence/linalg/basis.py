"""Orthonormal coordinates for one side of a layer's matrices.

Eigenvectors of a covariance, of blocks along its diagonal (Grosse et al. 2023, appendix
A: the factors' memory shrinks by the number of blocks), or none at all: the standard
basis, for sides too long for a covariance and for sides whose covariance is diagonal.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.linalg.contract import multiply


class Basis(NamedTuple):
    """An orthogonal matrix `Q`, block by block along its diagonal.

    Attributes:
      blocks: eigenvectors, in columns; `()` for the standard basis.
    """

    blocks: tuple[Array, ...]

    def into(self, x: Array) -> Array:
        """Returns the coordinates `Qᵀ x` of vectors along the last axis."""
        return self._each(x, self.blocks)

    def out_of(self, x: Array) -> Array:
        """Returns the vectors `Q x` with coordinates along the last axis."""
        return self._each(x, [jnp.matrix_transpose(q) for q in self.blocks])

    def dense(self, size: int) -> Array:
        """Returns `Q`, `[*stack, N, N]`; the standard basis without a stack."""
        dtype = self.blocks[0].dtype if self.blocks else None
        return self.into(jnp.eye(size, dtype=dtype))

    def _each(self, x: Array, blocks: Sequence[Array]) -> Array:
        if not blocks:
            return x
        ends = list(accumulate(q.shape[-1] for q in blocks))
        parts = jnp.split(x, ends[:-1], axis=-1)
        turned = [multiply(y, q) for y, q in zip(parts, blocks, strict=True)]
        return turned[0] if len(turned) == 1 else jnp.concatenate(turned, axis=-1)


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
