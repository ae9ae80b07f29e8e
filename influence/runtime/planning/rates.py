"""What this machine does on the spot: a product, a copy and eigenvectors, timed."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from influence.linalg import count
from influence.linalg.basis import eigen

SIZE, LENGTH, SIDE, TIMES = 1024, 1 << 24, 512, 3
"""Rows of what is multiplied, numbers that are copied, rows of what is decomposed, and
how often each is done."""


class Rates(NamedTuple):
    """What a device does in a second.

    Attributes:
      flops: floating-point operations of matrix products.
      bandwidth: bytes moved to and from its memory.
      eigen: operations of eigendecompositions, as `count.eigen` counts them.
    """

    flops: float
    bandwidth: float
    eigen: float


def measure() -> Rates:
    """Returns what the first device does in a second, in float32, measured now.

    A product of two matrices of 1024 rows, `2 n³` operations, an array of 64 MB read
    and written, and the eigenvectors of a matrix of 512 rows; of each the fastest of
    three. Takes a second on a core.

    Example:
      >>> from influence.runtime.planning.rates import measure
      >>> rates = measure()
      >>> rates.flops > 0 and rates.bandwidth > 0
      True
    """
    matrix = jnp.ones((SIZE, SIZE), jnp.float32)
    array = jnp.ones(LENGTH, jnp.float32)
    flops = 2 * SIZE**3 / _seconds(lambda: _product(matrix))
    bandwidth = 2 * array.nbytes / _seconds(lambda: _copy(array))
    rows = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    covariance = jnp.asarray(rows @ rows.T)
    seconds = _seconds(lambda: eigen(covariance)[1])
    return Rates(flops, bandwidth, count.eigen(SIDE) / seconds)


@jax.jit
def _product(x):
    return x @ x


@jax.jit
def _copy(x):
    return x + 1


def _seconds(work: Callable[[], jax.Array]) -> float:
    work().block_until_ready()
    found = []
    for _ in range(TIMES):
        begun = time.perf_counter()
        work().block_until_ready()
        found.append(time.perf_counter() - begun)
    return min(found)
