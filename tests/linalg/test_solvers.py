"""Iterative solvers reach the solution, each right-hand side on its own."""

from itertools import islice, repeat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.linalg import solvers

N, Q = 12, 3


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


ROOT = normal(0, N, N)
MATRIX = ROOT @ ROOT.T / N + 0.3 * jnp.eye(N)
NONE = jnp.eye(N)
NEAR = jnp.linalg.inv(jnp.diag(jnp.diag(MATRIX)))
B = {"x": normal(1, Q, 2, 4), "y": normal(2, Q, 4)}


def operator(matrix):
    def act(v):
        flat = jnp.concatenate([v["x"].reshape(-1, 8), v["y"]], axis=1) @ matrix
        return {"x": flat[:, :8].reshape(-1, 2, 4), "y": flat[:, 8:]}

    return act


EXPECTED = operator(jnp.linalg.inv(MATRIX))(B)


def nth(walk, n):
    return next(islice(walk, n, None))


def test_conjugate_gradients_end_after_as_many_steps_as_dimensions():
    walk = solvers.conjugate_gradients(operator(MATRIX), operator(NEAR), B)
    step = nth(walk, N)
    for k, x in EXPECTED.items():
        np.testing.assert_allclose(step.x[k], x, atol=1e-9)
    assert float(step.residual_Q.max()) < 1e-9


def test_conjugate_gradients_stand_still_once_they_have_arrived():
    walk = solvers.conjugate_gradients(operator(MATRIX), operator(NEAR), B)
    step = nth(walk, 5 * N)
    for k, x in EXPECTED.items():
        np.testing.assert_allclose(step.x[k], x, atol=1e-9)


def test_a_block_of_right_hand_sides_is_solved_as_each_alone():
    walk = solvers.conjugate_gradients(operator(MATRIX), operator(NEAR), B)
    together = nth(walk, 4)
    for q in range(Q):
        one = jax.tree.map(lambda x, q=q: x[q : q + 1], B)
        alone = nth(
            solvers.conjugate_gradients(operator(MATRIX), operator(NEAR), one), 4
        )
        np.testing.assert_allclose(together.residual_Q[q], alone.residual_Q[0])
        for k, x in alone.x.items():
            np.testing.assert_allclose(together.x[k][q], x[0], rtol=1e-9)


def test_conjugate_gradients_with_the_inverse_begin_at_the_solution():
    exact = operator(jnp.linalg.inv(MATRIX))
    step = next(solvers.conjugate_gradients(operator(MATRIX), exact, B))
    assert float(step.residual_Q.max()) < 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_neumann_series_converges(momentum):
    walk = solvers.neumann(
        repeat(operator(MATRIX)), operator(NEAR), B, repeat(0.3), momentum
    )
    step = nth(walk, 400)
    for k, x in EXPECTED.items():
        np.testing.assert_allclose(step.x[k], x, atol=1e-8)


def test_lissa_converges_below_its_largest_rate():
    largest = float(jnp.linalg.eigvalsh(MATRIX)[-1])
    step = nth(solvers.lissa(repeat(operator(MATRIX)), B, 1.9 / largest), 2000)
    for k, x in EXPECTED.items():
        np.testing.assert_allclose(step.x[k], x, atol=1e-8)
    beyond = nth(solvers.lissa(repeat(operator(MATRIX)), B, 2.5 / largest), 100)
    assert float(beyond.residual_Q.min()) > 10


def spread(x):
    return jnp.exp(-x) + 1 / (x + 0.5)


@pytest.mark.parametrize("near", [NONE, NEAR], ids=["plain", "preconditioned"])
def test_a_function_of_a_matrix_is_exact_in_the_whole_krylov_space(near):
    values, q = jnp.linalg.eigh(MATRIX)
    expected = operator((q * spread(values)[None]) @ q.T)(B)
    found = solvers.krylov(operator(MATRIX), operator(near), spread, B, N)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), found.x, expected
    )


def test_few_steps_are_near_where_the_function_is_smooth():
    values, q = jnp.linalg.eigh(MATRIX)
    expected = operator((q * spread(values)[None]) @ q.T)(B)
    errors = []
    for steps in (2, 4, 8):
        found = solvers.krylov(operator(MATRIX), operator(NONE), spread, B, steps)
        off = solvers.add(found.x, -jnp.ones(Q), expected)
        errors.append(float(jnp.sqrt(solvers.dot(off, off)).max()))
    # Each step multiplies the error by much less than one: geometric, not slower.
    assert errors[0] > 4 * errors[1] > 64 * errors[2]


def test_a_space_that_is_exhausted_stays_as_it_is():
    # Two distinct eigenvalues: after two steps there is nothing left to add.
    matrix = jnp.diag(jnp.repeat(jnp.array([1.0, 3.0]), N // 2))
    expected = operator(jnp.diag(spread(jnp.diag(matrix))))(B)
    found = solvers.krylov(operator(matrix), operator(NONE), spread, B, 6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), found.x, expected
    )
    np.testing.assert_allclose(found.last_Q, 0, atol=1e-10)


def test_inverting_is_the_best_there_is_where_conjugate_gradients_search():
    shift, steps = 0.5, 4
    damped = MATRIX + shift * NONE
    near = jnp.linalg.inv(jnp.diag(jnp.diag(damped)))
    found = solvers.krylov(
        operator(MATRIX),
        operator(near),
        lambda x: 1 / (x + shift),
        B,
        steps,
        shift=shift,
    )
    for x, b in zip(flat(found.x), flat(B), strict=True):
        powers = [near @ b]
        for _ in range(steps - 1):
            powers.append(near @ damped @ powers[-1])
        space = jnp.stack(powers, 1)
        # The least error in the norm of the matrix: what is left is orthogonal to all
        # that was searched.
        best = space @ jnp.linalg.solve(space.T @ damped @ space, space.T @ b)
        np.testing.assert_allclose(x, best, rtol=1e-8, atol=1e-10)


def test_a_good_preconditioner_takes_fewer_steps():
    # Eigenvalues over four orders of magnitude, and an inverse right to a tenth.
    values = jnp.logspace(-2, 2, N)
    q, _ = jnp.linalg.qr(ROOT)
    matrix = (q * values[None]) @ q.T
    noisy = values * (1 + 0.1 * normal(3, N))
    near = (q / (noisy + 1)[None]) @ q.T
    expected = operator((q / (values + 1)[None]) @ q.T)(B)
    errors = []
    for preconditioner in (NONE, near):
        found = solvers.krylov(
            operator(matrix),
            operator(preconditioner),
            lambda x: 1 / (x + 1),
            B,
            3,
            shift=1.0,
        )
        off = solvers.add(found.x, -jnp.ones(Q), expected)
        errors.append(float(jnp.sqrt(solvers.dot(off, off)).max()))
    assert errors[1] < errors[0] / 100


def test_nothing_asked_is_nothing_found():
    zero = jax.tree.map(jnp.zeros_like, B)
    found = solvers.krylov(operator(MATRIX), operator(NEAR), spread, zero, 3)
    assert not any(x.any() for x in jax.tree.leaves((found.x, found.last_Q)))


def flat(v):
    return jnp.concatenate([v["x"].reshape(-1, 8), v["y"]], axis=1)
