"""What truncation keeps is what the singular value decomposition keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.linalg import low_rank
from influence.linalg.low_rank import iterated, squared, truncated

LONG, SIDE, RANK = 600, 300, 12
SQUARE = 300
"""A longer side with which `hᵀ h` is not worth forming."""


def matrices(values, long=LONG, seed=0):
    """Returns two matrices with given singular values."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(2, long, len(values))))
    right, _ = np.linalg.qr(rng.normal(size=(2, len(values), len(values))))
    return jnp.asarray(left * values @ right.swapaxes(1, 2))


def lost(h, factors):
    left, right = factors
    return ((h - left @ right.mT) ** 2).sum((1, 2))


@pytest.mark.parametrize("long", [SQUARE, LONG])
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 2.0])
def test_iteration_loses_a_thousandth_more_than_the_decomposition(power, long):
    assert iterated(long, SIDE, RANK)
    assert squared(long, SIDE, RANK) == (long == LONG)
    values = np.arange(1, SIDE + 1) ** -power
    h, least = matrices(values, long), (values[RANK:] ** 2).sum()
    for x, found in (
        (h, truncated(h, RANK)),
        (h.mT, truncated(h.mT, RANK)),
    ):
        # What `TURNS` was chosen for, in the slowest of these; none can lose less.
        np.testing.assert_allclose(lost(x, found), least, rtol=1.5e-3)
        assert (lost(x, found) >= least * (1 - 1e-9)).all()  # rounding


@pytest.mark.parametrize("power", [0.25, 1.0, 3.0])
def test_what_single_precision_loses_is_little_of_all(power):
    values = np.arange(1, SIDE + 1) ** -power
    h, least = matrices(values), (values[RANK:] ** 2).sum()
    found = truncated(h.astype(jnp.float32), RANK)
    assert found[0].dtype == jnp.float32
    # Squares are known to a ten-millionth of the largest; a few roundings add up.
    wide = [x.astype(h.dtype) for x in found]
    excess = lost(h, wide) - least * 1.0015
    assert (excess < 1e-6 * (values**2).sum()).all()


def test_short_sides_are_decomposed():
    side = low_rank.SHORT
    assert not iterated(LONG, side, RANK)
    values = np.arange(1, side + 1) ** -0.25
    h = matrices(values)
    least = (values[RANK:] ** 2).sum()
    # Rounding: of a sum of squares.
    np.testing.assert_allclose(lost(h, truncated(h, RANK)), least, rtol=1e-9)


def test_a_rank_near_the_side_loses_nothing():
    assert not iterated(LONG, SIDE, SIDE)
    h = matrices(np.arange(1, SIDE + 1) ** -1.0)
    left, right = truncated(h, SIDE)
    np.testing.assert_allclose(left @ right.mT, h, atol=1e-9)  # rounding


def test_matrices_of_the_rank_asked_for_are_kept_whole():
    values = np.zeros(SIDE)
    values[: RANK - 2] = 1.0
    h = matrices(values)
    left, right = jax.jit(truncated, static_argnums=1)(h, RANK)
    np.testing.assert_allclose(left @ right.mT, h, atol=1e-9)  # rounding
    eye = np.broadcast_to(np.eye(RANK), (2, RANK, RANK))
    np.testing.assert_allclose(right.mT @ right, eye, atol=1e-9)
