"""The k largest of many numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.linalg.largest import (
    edge_of_largest,
    edge_of_rows,
    keep_largest,
    keep_largest_of_all,
)


def numbers(kind: str, dtype: str) -> jax.Array:
    x = np.abs(np.random.default_rng(0).normal(size=(40, 30)))
    if kind == "tied":
        x = np.round(x, 1)
    if kind == "sparse":
        x[x < 1.5] = 0
    if kind == "skewed":
        x = x**20
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["plain", "tied", "sparse", "skewed"])
@pytest.mark.parametrize("k", [1, 7, 600, 1199])
def test_the_edge_is_reached_by_k_numbers_or_as_few_as_ties_allow(kind, k, dtype):
    x = numbers(kind, dtype)
    reached = int((x >= edge_of_largest(x, k)).sum())
    kth = np.sort(np.asarray(x).ravel())[::-1][k - 1]
    if kth > 0:
        assert (x > kth).sum() < k <= reached <= (x >= kth).sum()
    else:
        assert edge_of_largest(x, k) == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["plain", "tied", "sparse", "skewed"])
@pytest.mark.parametrize("k", [1, 7, 29])
def test_every_row_s_edge_is_that_of_the_row_alone(kind, k, dtype):
    x = numbers(kind, dtype)
    single = jax.jit(lambda row: edge_of_largest(row[None], k))
    for row, edge in zip(x, edge_of_rows(x, k), strict=True):
        alone = single(row)
        np.testing.assert_array_equal(row >= edge, row >= alone)
        assert (edge == 0) == (alone == 0)


@pytest.mark.parametrize("k", [1, 5, 29, 30, 31])
def test_each_row_keeps_its_largest(k):
    x = numbers("plain", "float64")
    kept = keep_largest(x, k)
    assert ((kept > 0).sum(1) == min(k, 30)).all()
    np.testing.assert_array_equal(np.sort(kept)[:, -k:], np.sort(x)[:, -k:])


def test_a_gradient_flows_through_what_is_kept():
    x = numbers("plain", "float64")
    for keep in (lambda x: keep_largest(x, 3), lambda x: keep_largest_of_all(x, 50)):
        slope = jax.grad(lambda x, keep=keep: (keep(x) ** 2).sum())(x)
        np.testing.assert_array_equal(slope, 2 * keep(x))
