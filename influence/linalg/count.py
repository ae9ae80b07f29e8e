"""How many multiplications the algebra of one layer takes: one place for each count.

What chooses between two ways to the same numbers compares these, and what plans work
adds them up. Letters as in `influence.types`; a side's `blocks` are the lengths of the
blocks of its basis, none for the standard basis, which costs nothing.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from influence.linalg.contract import STRIPS, WIDE

Count = TypeVar("Count", int, np.ndarray)
"""One number of directions, or several."""

SYMMETRIC = 9
"""Operations of an eigendecomposition for every `n³`: 4/3 to reduce the matrix to a
tridiagonal one, and up to 8 for the eigenvectors (divide and conquer, LAPACK)."""


def gram(vectors: int, size: int) -> int:
    """Returns the multiplications of `xᵀ x` for so many vectors, by strips.

    Example:
      >>> from influence.linalg import count
      >>> count.gram(10, 4), count.gram(10, 1024) / (10 * 1024**2)
      (160, 0.625)
    """
    step = -(-size // STRIPS) if size >= WIDE else size
    starts = range(0, size, step)
    return vectors * sum(min(step, size - x) * (size - x) for x in starts)


def turn(blocks: Iterable[int]) -> int:
    """Returns those of turning one vector into a basis, block by block."""
    return onto((x, x) for x in blocks)


def onto(blocks: Iterable[Sequence[int]]) -> int:
    """Returns those of one vector's products with some directions of its parts.

    Args:
      blocks: of each part how long it is, and how many directions there are.
    """
    return sum(size * directions for size, directions in blocks)


def gradient(positions: int, outputs: int, inputs: int) -> int:
    """Returns those of one example's gradient, `Σ_t g_t a_tᵀ`."""
    return positions * outputs * inputs


def turned_positions(positions: int, turn_out: int, turn_in: int) -> int:
    """Returns those of turning what an example's gradient is made of, at each position.

    `T (O² + I²)`: `turn_out` and `turn_in` are those of one vector of either side.
    The gradient itself is formed after.
    """
    return positions * (turn_out + turn_in)


def turned_matrix(outputs: int, inputs: int, turn_out: int, turn_in: int) -> int:
    """Returns those of turning one matrix, `Q_Sᵀ V Q_A`: `O I (O + I)`.

    `turn_out` and `turn_in` are those of one vector of either side.
    """
    return inputs * turn_out + outputs * turn_in


def arms(outputs: int, inputs: int, leading_out: Count, leading_in: Count) -> Count:
    """Returns those of one position's part in `Uᵀ D` and `D V`, of leading directions.

    `D V` is not needed where `U` is all there is.
    """
    return leading_out * inputs + (leading_out < outputs) * leading_in * outputs


def eigen(size: int) -> int:
    """Returns the operations of one symmetric matrix's eigenvectors."""
    return SYMMETRIC * size**3


def dense_scan(
    examples: int, positions: int, queries: int, outputs: int, inputs: int
) -> int:
    """Returns those of a batch's gradients and their products with dense queries."""
    return examples * (positions + queries) * outputs * inputs


def expanded(queries: int, rank: int, outputs: int, inputs: int) -> int:
    """Returns those of multiplying out queries that are kept as factors."""
    return queries * rank * outputs * inputs


def factored_scan(
    samples: int, queries: int, rank: int, outputs: int, inputs: int
) -> int:
    """Returns those of scoring so many positions through queries' factors."""
    return samples * queries * rank * (outputs + inputs + 1)


def dense_tokens(samples: int, queries: int, outputs: int, inputs: int) -> int:
    """Returns those of scoring so many positions, each by itself, by dense queries."""
    return samples * queries * (outputs * inputs + min(outputs, inputs))
