"""Coordinates for one side of a layer's matrices, in which products are what they were.

Eigenvectors of a covariance, of blocks along its diagonal (Grosse et al. 2023, appendix
A: the factors' memory shrinks by the number of blocks), or none at all: the standard
basis, for sides too long for a covariance and for sides whose covariance is diagonal.
Or, in a fraction of the time, eigenvectors of most variance alone, and beside them what
is left of a vector without these.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.linalg import count
from influence.linalg.contract import multiply


class Coordinates(Protocol):
    """Coordinates for vectors."""

    def into(self, x: Array) -> Array:
        """Returns the coordinates of vectors along the last axis."""
        ...

    @property
    def work(self) -> int:
        """Returns the multiplications of turning one vector."""
        ...


class Basis(NamedTuple):
    """An orthogonal matrix `Q`, block by block along its diagonal.

    Attributes:
      blocks: eigenvectors, in columns; `()` for the standard basis.
    """

    blocks: tuple[Array, ...]

    def into(self, x: Array) -> Array:
        """Returns the coordinates `Qᵀ x` of vectors along the last axis."""
        return _each_block(multiply, x, self.blocks)

    def out_of(self, x: Array) -> Array:
        """Returns the vectors `Q x` with coordinates along the last axis."""
        return _each_block(multiply, x, [jnp.matrix_transpose(q) for q in self.blocks])

    @property
    def work(self) -> int:
        """Returns the multiplications of turning one vector."""
        return count.turn(q.shape[-1] for q in self.blocks)

    def leading(self, part: int) -> "Leading":
        """Returns the directions of most variance, one of `part` or a few more."""
        kept = [-(-q.shape[-1] // part) for q in self.blocks]
        pairs = zip(self.blocks, kept, strict=True)
        return Leading(tuple(q[..., -n:] for q, n in pairs))

    def dense(self, size: int) -> Array:
        """Returns `Q`, `[*stack, N, N]`; the standard basis without a stack."""
        dtype = self.blocks[0].dtype if self.blocks else None
        return self.into(jnp.eye(size, dtype=dtype))


class Leading(NamedTuple):
    """Some directions, and what is left of a vector without them: `[U, 1 - U Uᵀ]`.

    More coordinates than a vector has numbers; as `U Uᵀ + (1 - U Uᵀ)² = 1` they have
    the vectors' products all the same.

    Attributes:
      blocks: orthonormal directions of parts of a vector, in columns; `()` for none.
    """

    blocks: tuple[Array, ...]

    def into(self, x: Array) -> Array:
        """Returns the coordinates of vectors along the last axis.

        `[..., K + N]`, block behind block; `x` itself without blocks.
        """
        return _each_block(_apart, x, self.blocks)

    @property
    def work(self) -> int:
        """Returns the multiplications of turning one vector."""
        return sum(count.apart(*u.shape[-2:]) for u in self.blocks)


def turn(v_OxI: Array, outputs: Coordinates, inputs: Coordinates) -> Array:
    """Returns matrices with either side turned: `Q_Sᵀ V Q_A`, of orthonormal bases."""
    turned = jnp.matrix_transpose(inputs.into(v_OxI))
    return jnp.matrix_transpose(outputs.into(turned))


def _each_block(
    function: Callable[[Array, Array], Array], x: Array, blocks: Sequence[Array]
) -> Array:
    """Returns what a function makes of parts of vectors and blocks, in one row."""
    if not blocks:
        return x
    ends = list(accumulate(q.shape[-2] for q in blocks))
    parts = jnp.split(x, ends[:-1], axis=-1)
    found = [function(y, q) for y, q in zip(parts, blocks, strict=True)]
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)


def _apart(x: Array, leading_NxK: Array) -> Array:
    along = multiply(x, leading_NxK)
    rest = x - multiply(along, jnp.matrix_transpose(leading_NxK))
    return jnp.concatenate([along, rest], axis=-1)


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
